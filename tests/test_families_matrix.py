"""Methods x families: every pair that the invariants of test_methods do not meet runs once, or says why it can't."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.execution.attach import attached
from harness.model.step import Policy
from tests import tiny
from tests.matrix import CASES, FIRST, REPRESENTATIVE, UNLIKE
from tests.matrix_table import table

OTHERS = tuple(family for family in tiny.FAMILIES if family not in FIRST)
PAIRS = [(name, f) for f in OTHERS for name in CASES if not (f in UNLIKE and name in REPRESENTATIVE)]


def test_the_page_is_up_to_date() -> None:
    assert Path("docs/families.md").read_text() == table(), "make written"


@pytest.mark.parametrize("family", OTHERS)
def test_every_method_runs_or_says_why(family: str) -> None:
    """Attach, a pass, detach; afterwards the model is bit for bit what it was, and something was counted."""
    view, ids = tiny.view(family), tiny.tokens(2, 24)
    calibration = tiny.calibration(view)
    decode = torch.zeros_like(ids, dtype=torch.bool)
    decode[:, 12:] = True
    with torch.no_grad():
        before = view.model(ids).logits
    for name in (name for name, f in PAIRS if f == family):
        method = CASES[name].make(0.5)
        if (sentence := method.refusal(view)) is not None:
            assert " " in sentence
            continue
        with view.tracker.tracking(Policy()):
            state = method.fit(view, calibration) if method.needs != "nothing" else {}
        with torch.no_grad():
            with attached(view, [(method, state)], Policy(method.phases[0]), count=True) as ledger:
                with view.tracker.hint(torch.ones_like(decode), decode):
                    changed = view.model(ids, use_cache=False).logits
            assert torch.isfinite(changed).all(), name
            assert torch.equal(changed, before) == (name == "dense"), name
            assert torch.equal(view.model(ids).logits, before), name
        assert ledger is not None
        skipped, total = ledger.skipped_weights(tuple(view.projection_names()))
        assert total.sum() == ids.numel() * view.block_weights * view.n_layers, name
        if set(method.sites) == {"kv"}:  # saves reads of the cache, no weights
            read, seen = (
                sum(float(part.sum()) for part in parts.values()) for parts in (ledger.kv_read, ledger.kv_seen)
            )
            assert skipped.sum() == 0 and 0 < read < seen, name
            continue
        nothing = name in ("dense", "lte") or method.compensates or method.wraps
        assert nothing or 0 < skipped.sum() < total.sum(), name
