"""Search: bisection finds the edge, and PPL-p% runs on a real probe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import search
from harness.errors import ConfigError
from harness.rows import make_row
from harness.step import Policy
from methods.cett import Cett
from tests import tiny

BOUNDS = {"low": 0.0, "high": 1.0, "tolerance": 1e-4}


@given(st.floats(0.01, 0.99))
def test_the_edge_is_found_from_below(edge):
    found = search.highest(lambda level: level, lambda value: value <= edge, **BOUNDS)
    assert edge - 1e-4 <= found.level <= edge
    assert found.value == found.level and (found.level, found.value) in found.trials


def test_ppl_increase_and_critical_are_relative_to_dense():
    ppl = search.ppl_increase(lambda level: 20 * (1 + level**2), 20.0, 1.0, **BOUNDS)
    assert ppl.level == pytest.approx(0.1, abs=1e-3)
    accuracy = search.critical(lambda level: 0.5 - 0.1 * level, 0.5, **BOUNDS)
    assert accuracy.level == pytest.approx(0.05, abs=1e-3)


def test_all_or_nothing():
    assert search.highest(lambda level: 0.0, lambda value: True, **BOUNDS).level == 1.0
    with pytest.raises(ConfigError, match="lowest level"):
        search.highest(lambda level: 1.0, lambda value: False, **BOUNDS)


class Words:
    """A tokenizer for byte counts."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("knob", ["sparsity", "cett"])
def test_a_search_leaves_rows_and_respects_the_budget(knob):
    view = tiny.view("llama")
    method = Cett(0.5, cett=0.2 if knob == "cett" else None, cett_tokens=128)
    state = method.fit(view, tiny.calibration(view))
    rows = search.search_ppl_increase(
        view, Words(), method, state, Policy(), tiny.tokens(2, 32), percent=5.0, knob=knob, tolerance=0.05
    )
    for row in rows:
        make_row(cell_id="x", **row)
    value = {r["metric"]: r["value"] for r in rows if r.get("site") in (None, "mlp_hidden")}
    assert value["ppl_increase_5_perplexity"] <= 1.05 * value["ppl_increase_5_dense_perplexity"]
    assert 0 < value[f"ppl_increase_5_{knob}"] <= 0.95
    assert value["ppl_increase_5_achieved"] > 0.05
