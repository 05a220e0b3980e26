"""What must show on the embedded model. Minutes: `make test-slow`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from harness.data.text import calibration_text, evaluation_text, text_windows, token_windows
from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.selection import PROJECTIONS
from harness.model.step import Policy
from harness.probes import perplexity
from harness.probes.sparsity import measure
from harness.run.machine import pick_dtype
from methods.dense import Dense
from methods.oracle import Oracle
from methods.random import Random
from methods.teal import Teal, block_calls, block_error, block_output, levels_at, shares, threshold

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ready(embedded_dir, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(embedded_dir, dtype=getattr(torch, pick_dtype("auto", "cpu"))).eval()
    view = view_of(model.requires_grad_(False), name="smollm2-135m", fingerprint="embedded")
    calibration = Calibration(view, token_windows(tokenizer, calibration_text(), 512, count=16).split(4))
    windows = text_windows(tokenizer, evaluation_text(), 512).first(8, "perplexity")
    return view, tokenizer, calibration, windows, Teal().fit(view, calibration)


def score(ready, method, state) -> float:
    view, _, _, windows, _ = ready
    rows, _, _ = perplexity.measure(view, [(method, state)], Policy(), windows, 0, None, longest=8192)
    return next(r["value"] for r in rows if r["metric"] == "token_perplexity")


def test_perplexity_orders_as_it_must(ready):
    state = ready[4]
    dense = score(ready, Dense(), {})
    assert dense == pytest.approx(20.4, abs=0.6), "the embedded model or the text has changed"
    teal = {s: score(ready, Teal(s), state) for s in (0.25, 0.4, 0.5)}
    assert dense * 0.99 < teal[0.25] < teal[0.4] < teal[0.5]
    assert score(ready, Teal(0.0), state) == dense
    oracle = Oracle(0.4)
    by_norms = score(ready, oracle, oracle.fit(ready[0], ready[2]))
    assert dense < by_norms < score(ready, Random(0.4), {}) and by_norms == pytest.approx(teal[0.4], rel=0.2)


@pytest.mark.parametrize("sparsity", [0.25, 0.4, 0.5])
def test_teal_achieves_what_is_requested_on_held_out_text(ready, sparsity):
    view, _, _, windows, state = ready
    rows = measure(view, [(Teal(sparsity), state)], Policy(), windows.tokens[:4])
    achieved = next(
        r["value"] for r in rows if r["metric"] == "achieved" and r["site"] == "model" and r["step_phase"] == "all"
    )
    assert achieved == pytest.approx(sparsity, abs=0.02)


def test_greedy_allocation_beats_uniform_in_block_error(ready):
    """Published ratios at 0.5 lie between 0.85 and 0.93; three blocks stand for all."""
    from methods.teal import greedy_path

    view, _, calibration, _, state = ready
    names, share = view.projection_names(), shares(view)
    calls = block_calls(view, calibration, 512)
    raises = 0.1 * share[names.index("q")] / share
    site_of = {p: site for site, projections in PROJECTIONS.items() for p in projections}
    for layer in (2, 15, 27):
        path = greedy_path(view, layer, state, calls[layer], names, share, raises)
        with torch.no_grad():
            dense = [block_output(view.blocks[layer], *call).float() for call in calls[layer]]
            errors = []
            for levels in (levels_at(path, share, 0.5).tolist(), [0.5] * len(names)):
                cut = {p: threshold(state[site_of[p]][layer], level, view.dtype).t for p, level in zip(names, levels)}
                errors.append(block_error(view, layer, calls[layer], cut, dense))
        assert errors[0] < errors[1]
        print(f"block {layer}: greedy over uniform {errors[0] / errors[1]:.3f}")
