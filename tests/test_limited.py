"""One rule for what is a smoke run, and every row of a task under it."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from harness.model.families import view_of
from harness.model.lm import HarnessLM
from harness.model.step import Policy
from harness.probes import quality
from harness.results.limited import WHOLE, limited
from methods.random import Random


@pytest.mark.parametrize("of", WHOLE)
def test_a_whole_run_takes_all_or_enough(of):
    enough = WHOLE[of]
    assert limited(enough - 1, of) and not limited(enough, of)
    assert limited(2, of, 3) and not limited(3, of, 3) and not limited(enough, of, 10 * enough)


@pytest.fixture(scope="module")
def lm(tiny_folder, tokenizer):
    return HarnessLM(view_of(AutoModelForCausalLM.from_pretrained(tiny_folder).eval()), tokenizer, 8, max_length=40)


def scored(lm, name: str, limit: int | None):
    facts = (Policy(), name, "local", None, limit, 0)
    _, dense = quality.task(lm, [], *facts, None)
    return quality.task(lm, [(Random(0.5), {})], *facts, dense)[0]


@pytest.mark.parametrize(("limit", "smoke"), [(99, True), (100, False), (1000, False), (None, False)])
def test_all_rows_of_a_task_are_limited_or_none(lm, limit, smoke):
    """copa has 100 items: a limit that it does not reach leaves it whole. Scores and differences say the same."""
    rows = scored(lm, "copa", limit)
    metrics = {row["metric"] for row in rows}
    assert {"acc", "acc_minus_dense", "acc_headroom", "flips_right_to_wrong", "truncated", "achieved"} <= metrics
    assert {row["limited"] for row in rows} == {smoke}


def test_items_whose_context_is_cut_are_a_row(lm):
    """The model holds 40 tokens; some of boolq's passages, and no premise of copa's, are longer."""
    rows = {name: scored(lm, name, 5) for name in ("copa", "boolq")}
    cut = {name: next(row for row in own if row["metric"] == "truncated") for name, own in rows.items()}
    assert (cut["copa"]["value"], cut["copa"]["n"], cut["copa"]["message"]) == (0, 5, None)
    assert (cut["boolq"]["value"], cut["boolq"]["unit"]) == (5, "items")
    assert "beginning of their context was cut" in cut["boolq"]["message"]
