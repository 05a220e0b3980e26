"""The claims, their verdicts, and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from harness.claims.consistency import inconsistent_first
from harness.claims.evidence import ALPHA, ENOUGH, Claim
from harness.claims.hardware import activations_are_inert, batch_slows, batch_unites, nominal_exceeds_measured
from harness.claims.length import (
    kv_grows_with_length,
    kv_grows_with_sparsity,
    kv_skip_loses,
    prompt_fixed_fades,
    prompt_fixed_fails_generation,
)
from harness.claims.prediction import lookahead_worse, prediction_costs, swiglu_harder_to_predict
from harness.claims.relu import (
    CETT,
    gap_widens,
    sparsity_falls_with_depth,
    swiglu_less_sparse,
    swiglu_loses_more_accuracy,
    swiglu_loses_more_text,
)
from harness.claims.study import MissingEvidence, Study, study_of
from harness.console import complain, stdout, styled, table
from harness.errors import ConfigError
from harness.results import stats
from harness.results.find import find

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
    Claim("lookahead_worse", "Look-ahead predictors find less than serial ones", lookahead_worse),
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
    Claim("nominal_exceeds_measured", "Less time is saved than bytes", nominal_exceeds_measured),
    Claim("inconsistent_first", "Answers change before accuracy falls", inconsistent_first),
)
COLUMNS = {
    "claim": "string",
    "statement": "string",
    "verdict": "string",
    "effect": "Float64",
    "low": "Float64",  # 95 % interval of the effect
    "high": "Float64",
    "unit": "string",
    "p": "Float64",  # two-sided, of no effect
    "p_holm": "Float64",  # adjusted for all claims that could be tested
    "n": "Int64",
    "over": "string",  # what the n are
    "cells": "string",  # ids, one a line
    "limited": "boolean",  # rests on smoke runs
    "note": "string",
}


def verdicts(table: pd.DataFrame, samples: pd.DataFrame, limited: bool = False) -> pd.DataFrame:
    """One line a claim, with `COLUMNS`. table: of `harness.results.collect.collect`. samples: of `read_samples`.

    Effects come with a 95 % bootstrap interval over items, paired but where `Evidence.able` says otherwise, and p is
    corrected by Holm over the claims that could be tested. Models and methods are fixed, not sampled: an interval says
    how sure the effect is on these. limited: take rows of smoke runs in; the lines say so.
    """
    study = study_of(table, samples, limited)
    lines = [_line(claim, study) for claim in CLAIMS]
    tested = [line for line in lines if line["p"] is not None]
    for line, adjusted in zip(tested, stats.holm([line["p"] for line in tested]) if tested else [], strict=True):
        line["p_holm"] = adjusted
        if adjusted < ALPHA:
            line["verdict"] = "reproduced" if line["effect"] > 0 else "not reproduced"
    smoke = set(table.loc[table["limited"].fillna(False), "cell_id"])
    for line in lines:
        line["limited"] = bool(smoke & set((line["cells"] or "").split()))
    return pd.DataFrame(lines, columns=list(COLUMNS)).astype(COLUMNS)


def _line(claim: Claim, study: Study) -> dict[str, Any]:
    line: dict[str, Any] = dict.fromkeys(COLUMNS) | {"claim": claim.name, "statement": claim.statement}
    line |= {"verdict": "inconclusive", "n": 0}
    left_out = f"; left out, they skip nothing: {', '.join(study.left_out)}" if study.left_out else ""
    try:
        evidence = claim.test(study)
    except MissingEvidence as missing:
        return line | {"note": f"missing: {missing}{left_out}"}
    n = len(evidence.values)
    line |= {"n": n, "over": evidence.over, "unit": evidence.unit, "cells": " ".join(evidence.cells)}
    if n < ENOUGH:
        return line | {"note": f"missing: more {evidence.over} ({n} of at least {ENOUGH})"}
    found = evidence.tested()
    return line | {"effect": found.mean, "low": found.low, "high": found.high, "p": found.p, "note": evidence.note}


def print_verdicts(lines: pd.DataFrame, console: Console | None = None) -> None:
    """The verdicts as a table."""
    console = console or stdout()
    listing = table()
    for header, justify in (("claim", "left"), ("verdict", "left"), ("effect [95 %]", "right"), ("p (Holm)", "right")):
        listing.add_column(header, justify=justify, overflow="fold")  # type: ignore[arg-type]
    listing.add_column("n", justify="right")
    listing.add_column("what it rests on", overflow="fold")
    styles = {"reproduced": "green", "not reproduced": "red", "inconclusive": "yellow"}
    for line in lines.itertuples():
        effect = "" if pd.isna(line.effect) else f"{line.effect:+.4g} [{line.low:+.4g}, {line.high:+.4g}]\n{line.unit}"
        p = "" if pd.isna(line.p_holm) else f"{line.p_holm:.3g}"
        count = f"{line.n} {line.over}" if line.n else ""
        verdict = f"{line.verdict}{' (LIMITED RUN)' if line.limited else ''}"
        note = "" if pd.isna(line.note) else line.note
        told = (line.statement, (verdict, styles[line.verdict]), effect, p, count, note)
        listing.add_row(*(styled(cell) for cell in told))
    console.print(listing)


def main(args: Sequence[str] | None = None) -> int:
    """The command line: verdicts of a results folder. Exit code 2 where there are no results."""
    parser = argparse.ArgumentParser(prog="python -m harness.claims", description="Verdicts on the study's claims.")
    parser.add_argument("results", nargs="?", type=Path, default=Path("results"))
    parser.add_argument("--limited", action="store_true", help="take smoke runs in; their verdicts are marked")
    given = parser.parse_args(args)
    try:
        found = find(given.results)
        lines = verdicts(found.table, found.samples, given.limited)
    except ConfigError as error:
        complain(error)
        return 2
    print_verdicts(lines)
    return 0
