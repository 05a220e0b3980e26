"""The claims, their verdicts, and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.arguments import add_results, finish
from harness.arguments import parser as arguments_of
from harness.claims import models
from harness.claims.bits import bits_beat_channels
from harness.claims.consistency import inconsistent_first
from harness.claims.evidence import ALPHA, Claim, Evidence
from harness.claims.hardware import activations_are_inert, batch_slows, batch_unites, nominal_exceeds_measured
from harness.claims.length import (
    kv_grows_with_length,
    kv_grows_with_sparsity,
    kv_skip_loses,
    prompt_fixed_fades,
    prompt_fixed_fails_generation,
)
from harness.claims.prediction import lookahead_worse, prediction_costs, swiglu_harder_to_predict
from harness.claims.ranks import order_is_the_same
from harness.claims.relu import (
    CETT,
    gap_widens,
    sparsity_falls_with_depth,
    swiglu_less_sparse,
    swiglu_loses_more_accuracy,
    swiglu_loses_more_text,
)
from harness.claims.show import print_verdicts
from harness.claims.size import loss_shrinks_with_size_accuracy, loss_shrinks_with_size_text
from harness.claims.study import MissingEvidence, Study, study_of
from harness.results import stats
from harness.results.find import find
from harness.results.once import remembering

CLAIMS = (
    Claim(
        "swiglu_loses_more_accuracy",
        "SwiGLU loses more accuracy than its ReLU counterpart at equal MLP sparsity",
        swiglu_loses_more_accuracy,
    ),
    Claim(
        "swiglu_loses_more_text",
        "SwiGLU loses more on running text than its ReLU counterpart at equal MLP sparsity",
        swiglu_loses_more_text,
    ),
    Claim("gap_widens", "That gap widens with sparsity", gap_widens),
    Claim("swiglu_less_sparse", f"SwiGLU is naturally less sparse than ReLU at {CETT}", swiglu_less_sparse),
    Claim(
        "sparsity_falls_with_depth", "SwiGLU's natural sparsity falls from layer to layer", sparsity_falls_with_depth
    ),
    Claim("prediction_costs", "Predicting heads and neurons costs quality", prediction_costs),
    Claim("swiglu_harder_to_predict", "SwiGLU's neurons are harder to predict than ReLU's", swiglu_harder_to_predict),
    Claim("lookahead_worse", "Look-ahead predictors lose more than serial ones", lookahead_worse),
    Claim("kv_skip_loses", "Skipping KV entries loses more than masking the same heads", kv_skip_loses),
    Claim("kv_grows_with_sparsity", "That loss grows with the share of heads", kv_grows_with_sparsity),
    Claim("kv_grows_with_length", "That loss grows with the length of the text", kv_grows_with_length),
    Claim(
        "prompt_fixed_fails_generation",
        "Neurons fixed by the prompt fail in generation more than in scoring",
        prompt_fixed_fails_generation,
    ),
    Claim("prompt_fixed_fades", "Neurons fixed by the prompt serve long texts worse", prompt_fixed_fades),
    Claim("activations_are_inert", "Active neurons stay active from token to token", activations_are_inert),
    Claim("batch_unites", "A batch loses most of the sparsity of one token", batch_unites),
    Claim("batch_slows", "Sparsity that speeds one token up helps a batch less", batch_slows),
    Claim("nominal_exceeds_measured", "Less of a step's time is saved than of its bytes", nominal_exceeds_measured),
    Claim("inconsistent_first", "Answers change while accuracy stays the same", inconsistent_first),
    Claim(
        "loss_shrinks_with_size_text",
        "At equal sparsity larger models lose less on running text",
        loss_shrinks_with_size_text,
    ),
    Claim(
        "loss_shrinks_with_size_accuracy",
        "At equal sparsity larger models lose a smaller share of the answers that they can give",
        loss_shrinks_with_size_accuracy,
    ),
    Claim("order_is_the_same", "Schemes stand in the same order on every model", order_is_the_same),
    Claim("bits_beat_channels", "At equal bytes a token, fewer bits lose less than fewer channels", bits_beat_channels),
)
COLUMNS = {
    "claim": "string",
    "statement": "string",
    "verdict": "string",  # of `VERDICTS`
    "level": "string",  # what it holds for, of `LEVELS`
    "effect": "Float64",
    "low": "Float64",  # 95 % interval of the effect; of a description the range over its units
    "high": "Float64",
    "unit": "string",
    "p": "Float64",  # two-sided, of no effect
    "p_holm": "Float64",  # adjusted for all tests that were made
    "power": "Float64",  # the smallest effect that these data would have shown in 80 % of cases, in the effect's unit
    "n": "Int64",
    "over": "string",  # what the n are
    "seeds": "Int64",  # training runs behind it (of models times seeds), and how the effect is on each model
    "models": "Int64",  # models of a family and size behind it
    "by_model": "string",  # with 95 % intervals where something was drawn
    "tau": "Float64",  # standard deviation of the effect between models and pairs of them, in its unit
    "i_squared": "Float64",  # share of their variance that is no error
    "holds": "string",  # for which models the verdict holds, in words
    "cells": "string",  # ids, one a line
    "limited": "boolean",  # rests on smoke runs
    "note": "string",
}


@dataclass
class _Test:
    """One test: of the line's effect over items, over training runs or over models."""

    line: dict[str, Any]
    level: str
    units: NDArray[np.float64] | Evidence
    n: int
    mixed: bool = False  # the effect is above zero on some models and below on others: their mean says nothing

    def run(self) -> stats.PairedDifference:
        return self.units.tested() if isinstance(self.units, Evidence) else stats.paired(self.units)


@remembering()
def verdicts(table: pd.DataFrame, samples: pd.DataFrame, limited: bool = False) -> pd.DataFrame:
    """One line a claim, with `COLUMNS`. table: of `harness.results.collect.collect`. samples: of `read_samples`.

    Tested is what another study would draw anew: items and text, and, where there are enough of them, training runs and
    models. Layers, methods and settings are fixed: those claims are described, with the range over them. Each test is a
    sign-flip test (of shares a studentised bootstrap); p is corrected by Holm over all tests made, and a test that has
    too few units to reach the corrected level at all is not made. A verdict holds for the highest of `LEVELS` whose
    test says the same. limited: take rows of smoke runs in; the lines say so.
    """
    study = study_of(table, samples, limited)
    lines, planned, seen = [], [], []
    for claim in CLAIMS:
        line, tests, evidence = _line(claim, study)
        lines.append(line)
        planned += tests
        seen.append(evidence)
    tests, level = possible(planned)
    _judge(tests, level)
    for test in planned:
        if test.level == "items" and test not in tests:
            least = stats.least_units(ALPHA / (len(tests) + 1))
            test.line["note"] = (
                f"too few {test.line['over']} to tell: {test.n} of at least {least}; {test.line['note']}"
            )
    smoke = set(table.loc[table["limited"].fillna(False), "cell_id"])
    for line, evidence in zip(lines, seen, strict=True):
        line["holds"] = None if evidence is None else models.holds(line, evidence)
        line["limited"] = bool(smoke & set((line["cells"] or "").split()))
    return pd.DataFrame(lines, columns=list(COLUMNS)).astype(COLUMNS)


def possible(planned: Sequence[_Test]) -> tuple[list[_Test], float]:
    """The tests with units enough to reach the corrected level, and that level: as many as can be made together.

    It is decided by the numbers of units alone, before any p is seen.
    """
    for count in range(len(planned), 0, -1):
        least = stats.least_units(ALPHA / count)
        enough = [test for test in planned if test.n >= least]
        if len(enough) >= count:
            return enough, ALPHA / len(enough)
    return [], ALPHA


def _judge(tests: Sequence[_Test], level: float) -> None:
    """Fill in what the tests say, lowest level of each line first."""
    results = [test.run() for test in tests]
    for test, result, adjusted in zip(tests, results, stats.holm([result.p for result in results]), strict=True):
        line = test.line
        verdict = "inconclusive"
        if adjusted < ALPHA and test.mixed:
            line["note"] = f"the sign depends on the model: {line['by_model']}; {line['note']}"
        elif adjusted < ALPHA:
            verdict = "reproduced" if result.mean > 0 else "not reproduced"
        first = line["p"] is None
        if first:
            line |= {"effect": result.mean, "low": result.low, "high": result.high, "p": result.p, "p_holm": adjusted}
            line |= {"power": stats.detectable(result.error, test.n, level), "verdict": verdict, "level": test.level}
        elif verdict == line["verdict"] and verdict != "inconclusive":
            line["level"] = test.level


def _line(claim: Claim, study: Study) -> tuple[dict[str, Any], list[_Test], Evidence | None]:
    """The line of a claim before any test, the tests that would tell more, and what it rests on, if anything."""
    line: dict[str, Any] = dict.fromkeys(COLUMNS) | {"claim": claim.name, "statement": claim.statement}
    line |= {"verdict": "inconclusive", "n": 0}
    left_out = f"; left out, they skip nothing: {', '.join(study.left_out)}" if study.left_out else ""
    try:
        evidence = claim.test(study)
    except MissingEvidence as missing:
        return line | {"note": f"missing: {missing}{left_out}"}, [], None
    runs, bases = evidence.runs(), evidence.bases()
    line |= {"n": evidence.n, "over": evidence.over, "unit": evidence.unit, "cells": " ".join(evidence.cells)}
    line |= {"seeds": len(runs), "models": len(bases), "note": evidence.note, "level": "items"}
    line["by_model"], (line["tau"], line["i_squared"]) = models.told(models.on_each(evidence)), evidence.spread()
    if not evidence.drawn:
        effect, low, high = evidence.described()
        line |= {"verdict": "described", "level": "measured", "effect": effect, "low": low, "high": high}
    over = {"seeds": runs if len(runs) > len(bases) else runs[:0], "models": bases}
    if evidence.between:
        line |= {"seeds": pd.NA, "models": len({models.lineage(model)[0] for model in evidence.between})}
    mixed = len({np.sign(effect) for effect in evidence.by_model.values() if effect}) > 1
    tests = [_Test(line, "items", evidence, evidence.n, mixed)] if evidence.drawn else []
    tests += [_Test(line, level, units, len(units)) for level, units in over.items() if len(units) > 1]
    return line, tests, evidence


def main(arguments: Sequence[str]) -> int:
    """The command `claims`: print the verdicts of a results folder. Returns the exit code."""
    parser = arguments_of("claims", "Verdicts on the study's claims, with what they rest on.")
    add_results(parser)
    parser.add_argument("--limited", action="store_true", help="take smoke runs in; their verdicts are marked")
    given = parser.parse_args(arguments)

    def do() -> None:
        found = find(given.results)
        print_verdicts(verdicts(found.table, found.samples, given.limited))

    return finish(do)
