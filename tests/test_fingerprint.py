"""Numbers and names that must not move unawares: the quickstart's ids, and what each method does.

`python -m tests.test_fingerprint` writes tests/fingerprint.json anew. Do that only for a change that is meant to alter
numbers or ids, and say so in CHANGELOG.md under **numbers**.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from harness.run.overrides import composed, expand, opening
from tests import tiny
from tests.matrix import CASES, FIRST
from tests.test_methods import LENGTH, logits, prepared

FILE = Path(__file__).parent / "fingerprint.json"
LEARNT = (
    "dejavu",
    "moefication",
    "kv_skip",
    "kv_recompute",
    "expert_prune",
)  # by gradient steps, which differ by processor
BY_BASIS = ("larosa", "wina_transform")  # by eigenvectors, which differ by processor too: a choice near a tie may flip


def quick_ids() -> list[str]:
    """The ids of the quickstart's cells, in the order of its sweeps, with nothing left to the machine."""
    from harness.run.config import check

    fixed = ["experiment=quickstart", "dtype=float32", "device=cpu"]
    sweeps = opening(fixed)["sweeps"] or [[]]
    combinations = [c for sweep in sweeps for c in expand([*fixed, *map(str, sweep)])]
    with mock.patch("harness.run.machine.cpu_name", return_value="a CPU"):  # what is timed belongs to its processor
        return [check(composed(c)).id for c in combinations]


def effect(name: str, family: str) -> dict[str, float | str] | None:
    """What a method at 0.5 does to the logits of a tiny model in float64: their norm, and a hash of every bit."""
    made = prepared(name, family)
    if made is None:
        return None
    out = logits(*made, tiny.tokens(2, LENGTH))
    return {"norm": out.norm().item(), "bits": hashlib.sha256(out.numpy().tobytes()).hexdigest()[:16]}


def test_cell_ids_are_those_of_before():
    assert quick_ids() == json.loads(FILE.read_text())["ids"]


@pytest.mark.parametrize("family", FIRST)
@pytest.mark.parametrize("name", CASES)
def test_a_method_does_what_it_did_before(name, family):
    """Within rounding only: the bits in the file are those of one processor."""
    known = json.loads(FILE.read_text())["effects"]
    before, now = known.get(f"{name}-{family}"), effect(name, family)
    if not any(f"{name}-{other}" in known for other in FIRST):
        pytest.skip("a new method: `make written` keeps what it does")
    assert (before is None) == (now is None)
    if now is not None:
        tolerance = 2e-2 if name.startswith(LEARNT) else 1e-3 if name.startswith(BY_BASIS) else 1e-5
        assert now["norm"] == pytest.approx(before["norm"], rel=tolerance)


def main(only_new: bool) -> None:
    """Write the file: all of it, or what new methods do."""
    torch.manual_seed(0)
    kept = json.loads(FILE.read_text()) if only_new else {"ids": quick_ids(), "effects": {}}
    for name in CASES:
        if not any(f"{name}-{family}" in kept["effects"] for family in FIRST):
            made = {f"{name}-{family}": effect(name, family) for family in FIRST}
            kept["effects"] |= {key: value for key, value in made.items() if value is not None}
    FILE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main(only_new=sys.argv[1:] == ["new"])
