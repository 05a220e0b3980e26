"""The study's claims as statistical tests over collected rows and per-item samples: `python -m harness.claims`.

A claim is a function from the study to the evidence for it: values paired with a reference, signed so that above zero
supports it. The verdict is `reproduced` (the Holm-adjusted p is below 0.05 and the effect is as claimed), `not
reproduced` (the same with the opposite sign) or `inconclusive`, with what is missing named where something is.

What counts as evidence: measured rows whose status is ok, of whole runs (`limited=True` takes smoke runs in, and says
so); cells that were counted to skip something; tasks on which the dense model is above chance; times of kernels only.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from harness import stats
from harness.collect import ACHIEVED, TIME_RATIO, collect, read_table
from harness.errors import ConfigError
from harness.store import Store, place_errors, write_atomic
from harness.study import (
    EQUAL_SPARSITY,
    POLICY,
    MissingEvidence,
    Study,
    by_option,
    contrast,
    equally_sparse,
    gaps,
    matched_models,
    need,
    numbers,
    options,
    read_samples,
    rows_by_layer,
    slopes,
    study_of,
    used,
)

RESAMPLES = stats.RESAMPLES
ALPHA = 0.05  # of the family of claims, by Holm
ENOUGH = 5  # items; fewer say nothing
EQUAL_DENSITY = 0.02  # recall is compared at densities this near
MATERIAL_FLIPS = 0.02  # share of changed answers that makes outputs inconsistent
CETT = "cett=0.2"  # the study's error budget

PROMPT_FIXED = ("griffin", "tda")


@dataclass(frozen=True)
class Evidence:
    """values, reference: [n], above zero in the difference supports the claim; not paired if `paired` is False."""

    values: NDArray[np.float64]
    over: str  # what the n are
    unit: str
    cells: tuple[str, ...]
    reference: NDArray[np.float64] | None = None
    paired: bool = True
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """One line of the verdict table."""

    name: str
    statement: str
    test: Callable[[Study], Evidence]


# ------------------------------------------------------------------------------------- SwiGLU beside ReLU


TWO_MODELS = "cells of one method on a SwiGLU model and on its ReLU counterpart, equally sparse in the MLPs"


def _loses_more(study: Study, kind: str, unit: str, over: str) -> Evidence:
    pairs = need(equally_sparse(study), TWO_MODELS)
    gap = need(gaps(study, pairs, "swiglu", "relu", kind), f"{TWO_MODELS}, with {over} that both were scored on")
    pairs = pairs.loc[gap.columns]
    by_model = gap.mean().groupby(pairs["pair"]).mean()
    note = ", ".join(f"{pair}: {value:+.4f}" for pair, value in by_model.items())
    cells = used(pairs["swiglu"], pairs["relu"])
    return Evidence(numbers(gap.mean(axis=1)), over, unit, cells, note=f"mean of {len(pairs)} pairs of cells; {note}")


def swiglu_loses_more_accuracy(study: Study) -> Evidence:
    """Loss of accuracy, SwiGLU minus ReLU, by item."""
    return _loses_more(study, "accuracy", "share of answers", "items")


def swiglu_loses_more_text(study: Study) -> Evidence:
    """Loss on running text, SwiGLU minus ReLU, by window."""
    return _loses_more(study, "text", "nats/token", "text windows")


def gap_widens(study: Study) -> Evidence:
    """Slope of the gap on running text over the achieved sparsity, by window."""
    pairs = need(equally_sparse(study), TWO_MODELS)
    gap = gaps(study, pairs, "swiglu", "relu", "text")
    pairs = pairs.loc[gap.columns]
    rising = [
        (group, slopes(gap[group.index], numbers(group["achieved"])))
        for _, group in pairs.groupby(["pair", "method"])
        if group["achieved"].max() - group["achieved"].min() > EQUAL_SPARSITY
    ]
    if not rising:
        raise MissingEvidence(f"{TWO_MODELS}, at two or more sparsities, with text windows")
    together = pd.concat([group for group, _ in rising])
    slope = pd.concat([slope for _, slope in rising], axis=1).mean(axis=1)
    cells = used(together["swiglu"], together["relu"])
    return Evidence(numbers(slope), "text windows", "nats/token for all of the sparsity", cells)


# ------------------------------------------------------------------------------------- natural sparsity


def _natural(study: Study) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Achieved MLP sparsity at the study's CETT, layers x models, and the cells."""
    rows = rows_by_layer(study, ACHIEVED, site="mlp_hidden", method="cett", variant=CETT)
    rows = need(rows[rows["step_phase"] == "all"], f"cells of method cett with {CETT} and the sparsity probe")
    return rows.pivot_table(index="layer", columns="model", values="value"), used(rows["cell_id"])


def swiglu_less_sparse(study: Study) -> Evidence:
    """Natural sparsity at equal error, ReLU minus SwiGLU, by layer."""
    natural, cells = _natural(study)
    pairs = [(s, r) for s, r in matched_models(study) if {s, r} <= set(natural.columns)]
    if not pairs:
        raise MissingEvidence(f"method cett with {CETT} on a SwiGLU model and on its ReLU counterpart")
    gap = pd.concat([natural[relu] - natural[swiglu] for swiglu, relu in pairs], axis=1).dropna().mean(axis=1)
    said = [f"{name} {m.mean():.1%} ({m.min():.1%} to {m.max():.1%} by layer)" for name, m in natural.items()]
    note = f"{'; '.join(said)}; published for LLaMA-3-8B: 67.29 %"
    return Evidence(numbers(gap), "layers", "share of neurons", cells, note=note)


def sparsity_falls_with_depth(study: Study) -> Evidence:
    """Natural sparsity of SwiGLU models, an early layer minus its mirror image at the end, by such pair."""
    natural, cells = _natural(study)
    activation = study.lines.drop_duplicates("model").set_index("model")["activation"].fillna("")
    models = [m for m in natural.columns if "relu" not in activation[m].lower()]
    if not models:
        raise MissingEvidence(f"method cett with {CETT} on a SwiGLU model")
    layers = numbers(natural[models].dropna().mean(axis=1))
    half = len(layers) // 2
    note = f"first layer {layers[0]:.1%}, last {layers[-1]:.1%}; published for LLaMA-3-8B: over 99 % and about 10 %"
    early, late = layers[:half], layers[::-1][:half]
    return Evidence(early, "pairs of layers", "share of neurons", cells, reference=late, note=note)


# -------------------------------------------------------------------------------------------- prediction


def prediction_costs(study: Study) -> Evidence:
    """Loss on running text with a trained predictor minus with perfect choices at the same k, by window."""
    dejavu = by_option(study.select("dejavu"), "predictor", "serial", ("rank", "epochs"))
    routed = by_option(study.select("moefication"), "router", "mlp", ("epochs",))
    pairs = [contrast(dejavu, "serial", "oracle"), contrast(routed, "mlp", "oracle")]
    pairs = need(pd.concat(pairs, ignore_index=True), "dejavu with predictor=serial beside predictor=oracle")
    gap = need(gaps(study, pairs, "cell_id_worse", "cell_id_better", "text"), "text windows of dejavu and its oracle")
    pairs = pairs.loc[gap.columns]
    losses = [study.loss(cell, "text") for cell in pairs["cell_id_worse"]]
    whole = np.mean([loss.mean() for loss in losses if loss is not None])
    share = gap.mean().mean() / whole if whole > 0 else np.nan
    cells = used(pairs["cell_id_worse"], pairs["cell_id_better"])
    note = f"{share:.0%} of the loss is due to prediction" if np.isfinite(share) else ""
    return Evidence(numbers(gap.mean(axis=1)), "text windows", "nats/token", cells, note=note)


def swiglu_harder_to_predict(study: Study) -> Evidence:
    """Recall of neurons at matched density, ReLU minus SwiGLU, by layer."""
    recall = rows_by_layer(study, "recall", probe="predictivity", site="neurons")
    density = rows_by_layer(study, "density", probe="predictivity", site="neurons")[["cell_id", "layer", "value"]]
    recall = recall.merge(density, on=["cell_id", "layer"], suffixes=("", "_density"))
    recall = recall[~recall["variant"].fillna("").str.contains("oracle|random")]
    recall = recall.assign(variant=recall["variant"].fillna(""))
    found = []
    for swiglu, relu in matched_models(study):
        parts = [recall[recall["model"] == model] for model in (relu, swiglu)]
        keys = ["method", "variant", "sparsity_requested", "layer", *POLICY]
        both = parts[0].merge(parts[1], on=keys, suffixes=("_relu", "_swiglu"))
        found.append(both[(both["value_density_relu"] - both["value_density_swiglu"]).abs() <= EQUAL_DENSITY])
    missing = "predictivity of one predictor on a SwiGLU model and on its ReLU counterpart, at equal density"
    both = need(pd.concat(found) if found else pd.DataFrame(), missing)
    layers = both.groupby("layer")[["value_relu", "value_swiglu"]].mean()
    note = f"recall {layers['value_relu'].mean():.1%} on ReLU, {layers['value_swiglu'].mean():.1%} on SwiGLU"
    cells = used(both["cell_id_relu"], both["cell_id_swiglu"])
    ours, theirs = numbers(layers["value_relu"]), numbers(layers["value_swiglu"])
    return Evidence(ours, "layers", "recall", cells, reference=theirs, note=note)


def lookahead_worse(study: Study) -> Evidence:
    """Recall of serial minus look-ahead predictors, by site and layer."""
    recall = rows_by_layer(study, "recall", probe="predictivity")
    recall = by_option(recall[recall["method"] == "dejavu"], "predictor", "serial", ("lookahead",))
    both = contrast(recall, "lookahead", "serial", extra=("site", "layer"))
    need(both, "predictivity of dejavu with predictor=serial beside predictor=lookahead")
    layers = both.groupby(["site", "layer"])[["value_better", "value_worse"]].mean()
    by_site = (layers["value_better"] - layers["value_worse"]).groupby("site").mean()
    note = ", ".join(f"{site}: {value:+.3f}" for site, value in by_site.items())
    cells = used(both["cell_id_worse"], both["cell_id_better"])
    serial, ahead = numbers(layers["value_better"]), numbers(layers["value_worse"])
    return Evidence(serial, "layers and sites", "recall", cells, reference=ahead, note=note)


# ---------------------------------------------------------------------------------------------- KV cache


KV = "kv_skip with kv=skip beside kv=mask_output"


def _kv_pairs(study: Study, choice: str = "skip") -> pd.DataFrame:
    lines = by_option(study.select("kv_skip"), "kv", "skip", ("dropped",))
    return contrast(lines, choice, "mask_output")


def kv_skip_loses(study: Study) -> Evidence:
    """Loss on running text with missing entries minus with masked outputs alone, by window."""
    pairs = need(_kv_pairs(study), KV)
    gap = need(gaps(study, pairs, "cell_id_worse", "cell_id_better", "text"), f"{KV}, with text windows")
    pairs = pairs.loc[gap.columns]
    kept = ["zeros kept" if options(v).get("dropped") == "zeros" else "excluded" for v in pairs["variant_worse"]]
    note = ", ".join(f"{name}: {value:+.4f}" for name, value in gap.mean().groupby(kept).mean().items())
    rebuilt = _kv_pairs(study, "recompute")
    same = gaps(study, rebuilt, "cell_id_worse", "cell_id_better", "text")
    if len(same):
        note += f"; recompute beside mask_output: {same.mean().mean():+.1e}"
    cells = used(pairs["cell_id_worse"], pairs["cell_id_better"])
    return Evidence(numbers(gap.mean(axis=1)), "text windows", "nats/token", cells, note=note)


def kv_grows_with_sparsity(study: Study) -> Evidence:
    """Slope of that gap over the share of dropped heads, by window."""
    pairs = need(_kv_pairs(study), KV)
    gap = gaps(study, pairs, "cell_id_worse", "cell_id_better", "text")
    pairs = pairs.loc[gap.columns].assign(variant_worse=lambda frame: frame["variant_worse"].fillna(""))
    rising = [
        (group, slopes(gap[group.index], numbers(group["sparsity_requested"])))
        for _, group in pairs.groupby(["model", "method", "variant_worse", *POLICY], dropna=False)
        if group["sparsity_requested"].nunique() > 1
    ]
    if not rising:
        raise MissingEvidence(f"{KV}, at two or more sparsities, with text windows")
    together = pd.concat([group for group, _ in rising])
    slope = pd.concat([slope for _, slope in rising], axis=1).mean(axis=1)
    cells = used(together["cell_id_worse"], together["cell_id_better"])
    return Evidence(numbers(slope), "text windows", "nats/token for all of the heads", cells)


def growth(lossy: list[tuple[float, pd.Series]]) -> pd.Series:
    """What the longest windows lose more than the shortest, by the longest windows' stretches of the text.

    lossy: (tokens of a window, loss by (task, window)), several lengths. Windows are consecutive from the text's start.
    """
    ends = [min(lossy, key=lambda pair: pair[0]), max(lossy, key=lambda pair: pair[0])]
    longest = ends[1][0]
    means = []
    for length, loss in ends:
        place = (loss.index.get_level_values("item").astype(float) * length // longest).astype(int)
        full = loss.groupby(place).filter(lambda part, whole=longest / length: len(part) >= whole)
        kept = (full.index.get_level_values("item").astype(float) * length // longest).astype(int)
        means.append(full.groupby(kept).mean())
    return (means[1] - means[0]).dropna()


def _grows_with_length(
    lines: pd.DataFrame, keys: list[str], cells: list[str], loss: Callable[[pd.Series], pd.Series | None], what: str
) -> Evidence:
    """Growth with the length of the text, mean over groups of cells that differ in `length` alone."""
    found, names = [], []
    for _, group in lines.dropna(subset=["length"]).groupby(keys, dropna=False):
        lossy = [(float(line["length"]), loss(line)) for _, line in group.iterrows()]
        measured = [(length, values) for length, values in lossy if values is not None and len(values)]
        if len({length for length, _ in measured}) > 1:
            found.append(growth(measured))
            names += [group[cell] for cell in cells]
    if not found:
        raise MissingEvidence(f"{what}, on the same text in windows of two or more lengths")
    together = pd.concat(found, axis=1).dropna().mean(axis=1)
    return Evidence(numbers(together), "stretches of text", "nats/token, longest minus shortest windows", used(*names))


def kv_grows_with_length(study: Study) -> Evidence:
    """What missing entries cost in long windows minus in short ones, by stretch of text."""
    pairs = need(_kv_pairs(study), KV).assign(variant_worse=lambda frame: frame["variant_worse"].fillna(""))

    def gap(pair: pd.Series) -> pd.Series | None:
        ours, theirs = (study.loss(pair[f"cell_id_{end}"], "text") for end in ("worse", "better"))
        return None if ours is None or theirs is None else (ours - theirs).dropna()

    keys = ["model", "method", "variant_worse", "sparsity_requested", *POLICY[:-1]]
    return _grows_with_length(pairs, keys, ["cell_id_worse", "cell_id_better"], gap, KV)


# ------------------------------------------------------------------------------------ fixed by the prompt


def prompt_fixed_fails_generation(study: Study) -> Evidence:
    """Share of what the dense model can do that is lost, by item: generated answers against scored ones."""
    lines = need(study.select(*PROMPT_FIXED), "cells of griffin or tda")
    generative = study.rows[study.rows["metric"].str.startswith("exact_match").fillna(False)]["task"].unique()
    lost: dict[bool, list[pd.Series]] = {True: [], False: []}
    cells = []
    for cell in lines["cell_id"]:
        loss = study.loss(cell, "accuracy")
        if loss is None:
            continue
        cells.append(cell)
        tasks = loss.index.get_level_values("task")
        room = np.array([study.room[study.twins[cell, "accuracy"], task] for task in tasks])
        for kind in (True, False):
            lost[kind].append((loss / room)[tasks.isin(generative) == kind])
    for kind, words in ((True, "a generative task"), (False, "a scored task")):
        if not sum(map(len, lost[kind])):
            raise MissingEvidence(f"griffin or tda on {words} that the dense model can do")
    ours, theirs = (pd.concat(lost[kind], axis=1).mean(axis=1) for kind in (True, False))
    note = f"{ours.mean():.1%} of it lost in {len(ours)} generated answers, {theirs.mean():.1%} in {len(theirs)} scored"
    return Evidence(
        numbers(ours), "items", "share of dense", tuple(sorted(cells)), numbers(theirs), paired=False, note=note
    )


def prompt_fixed_fades(study: Study) -> Evidence:
    """What prompt-fixed neurons cost in long texts minus in short ones, by stretch of text."""
    lines = need(study.select(*PROMPT_FIXED), "cells of griffin or tda").assign(
        variant=lambda f: f["variant"].fillna("")
    )
    keys = ["model", "method", "variant", "sparsity_requested", *POLICY[:-1]]
    return _grows_with_length(
        lines, keys, ["cell_id"], lambda line: study.loss(line["cell_id"], "text"), "griffin or tda"
    )


def _active(study: Study, metric: str) -> pd.DataFrame:
    """Rows of the affinity probe beside the density (`value_chance`), where that is no matter of course.

    A SwiGLU model's own neurons are all active, a prompt-fixed set never changes, and a random one says nothing.
    """
    rows = rows_by_layer(study, metric, probe="affinity", site="neurons")
    density = rows_by_layer(study, "density", probe="affinity", site="neurons")[["cell_id", "layer", "value"]]
    rows = rows.merge(density, on=["cell_id", "layer"], suffixes=("", "_chance"))
    return rows[(rows["value_chance"] < 0.99) & ~rows["method"].isin([*PROMPT_FIXED, "random"])]


def activations_are_inert(study: Study) -> Evidence:
    """Share of active neurons that the token before had active too, minus what chance would give, by layer."""
    both = _active(study, "reuse_previous")
    need(both, "the affinity probe on cells whose neurons are not all active")
    layers = both.groupby("layer")[["value", "value_chance"]].mean()
    note = f"reused {layers['value'].mean():.1%}, by chance {layers['value_chance'].mean():.1%}"
    ours, chance_ = numbers(layers["value"]), numbers(layers["value_chance"])
    return Evidence(ours, "layers", "share of active neurons", used(both["cell_id"]), reference=chance_, note=note)


# ------------------------------------------------------------------------------------------- batch and time


def batch_unites(study: Study) -> Evidence:
    """Share of neurons that some row of the largest batch needs, minus what one row needs, by layer."""
    union = _active(study, "union_batch")
    if union["batch"].nunique() < 2:
        raise MissingEvidence("the affinity probe's unions at two or more batch sizes, of neurons not all active")
    layers = union.pivot_table(index="layer", columns="batch", values="value").dropna()
    one, many = layers.columns.min(), layers.columns.max()
    note = f"{layers[one].mean():.1%} at batch {one}, {layers[many].mean():.1%} at batch {many}"
    values, reference = numbers(layers[many]), numbers(layers[one])
    return Evidence(values, "layers", "share of neurons", used(union["cell_id"]), reference=reference, note=note)


def _kernel_times(study: Study) -> pd.DataFrame:
    """Paired time ratios of methods' own kernels: cell, batch, context, value. Masked execution never counts."""
    rows = study.rows[(study.rows["metric"] == TIME_RATIO) & (study.rows["execution"] == "kernel")]
    rows = rows[rows["cell_id"].isin(study.counted) & (rows["sparsity_requested"] > 0)]
    return need(rows, "kernel times of a method (masked execution is no time)")


def batch_slows(study: Study) -> Evidence:
    """Speed-up at batch 1 minus at the largest batch, by cell and context."""
    times = _kernel_times(study).pivot_table(index=["cell_id", "context"], columns="batch", values="value")
    if times.shape[1] < 2:
        raise MissingEvidence("kernel times at two or more batch sizes (where no kernel serves a batch, none is timed)")
    one, many = times.columns.min(), times.columns.max()
    times = need(times[[one, many]].dropna(), "kernel times of one cell at two or more batch sizes")
    note = f"{times[one].mean():.2f}x at batch {one}, {times[many].mean():.2f}x at batch {many}"
    cells = used(times.index.get_level_values("cell_id"))
    return Evidence(numbers(times[one]), "cells", "speed-up", cells, reference=numbers(times[many]), note=note)


def nominal_exceeds_measured(study: Study) -> Evidence:
    """Share of block weights that a token did not touch, minus the share of time saved, by cell at batch 1."""
    times = _kernel_times(study)
    times = times[times["batch"] == times["batch"].min()].groupby("cell_id")["value"].mean()
    lines = study.lines.set_index("cell_id").reindex(times.index)
    if "achieved_model" not in lines or lines["achieved_model"].isna().all():
        raise MissingEvidence("achieved sparsity of cells with kernel times")
    nominal = lines["achieved_model"].dropna()
    saved = 1 - 1 / times[nominal.index]
    slower = [f"{lines.loc[c, 'method']} {lines.loc[c, 'sparsity_requested']:g}" for c in saved.index if saved[c] < 0]
    note = (
        f"{nominal.mean():.1%} of bytes, {saved.mean():.1%} of time; slower than dense: {', '.join(slower) or 'none'}"
    )
    values, reference = numbers(nominal), numbers(saved)
    return Evidence(values, "cells", "share", used(nominal.index), reference=reference, note=note)


# ---------------------------------------------------------------------------------------------- consistency


def inconsistent_first(study: Study) -> Evidence:
    """Share of changed answers above `MATERIAL_FLIPS`, by item, where accuracy has not fallen measurably.

    Of each method on each model, the sparsest such cell counts.
    """
    lines = study.select().assign(variant=lambda frame: frame["variant"].fillna(""))
    flips, cells, divergence = [], [], []
    for _, group in lines.groupby(["model", "method", "variant", *POLICY], dropna=False):
        for line in group.sort_values("sparsity_requested", ascending=False).itertuples():
            loss = study.loss(line.cell_id, "accuracy")
            if loss is None or len(loss) < ENOUGH:
                continue
            if stats.paired_bootstrap(numbers(loss), np.zeros(len(loss)), resamples=RESAMPLES).p > ALPHA:
                flips.append(loss.abs())
                cells.append(line.cell_id)
                divergence.append(getattr(line, "kl", np.nan))
                break
    if not flips:
        raise MissingEvidence("a cell with items of an informative task whose accuracy has not fallen measurably")
    changed = pd.concat(flips, axis=1).mean(axis=1)
    kl = pd.Series(divergence, dtype="Float64").mean()
    note = f"{changed.mean():.1%} of answers changed in {len(cells)} cells" + (f", KL {kl:.3f}" if pd.notna(kl) else "")
    return Evidence(numbers(changed) - MATERIAL_FLIPS, "items", "share of answers", tuple(sorted(cells)), note=note)


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
    Claim("batch_unites", "A batch needs many more neurons than one token", batch_unites),
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
    """One line a claim, with `COLUMNS`. table: of `harness.collect.collect`. samples: of `read_samples`.

    Effects come with a 95 % bootstrap interval over items, paired but where `Evidence.paired` says otherwise, and p is
    corrected by Holm over the claims that could be tested. limited: take rows of smoke runs in; the lines say so.
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
        line["limited"] = bool(smoke & set((line["cells"] or "").split("\n")))
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
    line |= {"n": n, "over": evidence.over, "unit": evidence.unit, "cells": "\n".join(evidence.cells)}
    if n < ENOUGH:
        return line | {"note": f"missing: more {evidence.over} ({n} of at least {ENOUGH})"}
    reference = np.zeros(n) if evidence.reference is None else evidence.reference
    found = (
        stats.paired_bootstrap(evidence.values, reference) if evidence.paired else unpaired(evidence.values, reference)
    )
    return line | {"effect": found.mean, "low": found.low, "high": found.high, "p": found.p, "note": evidence.note}


def unpaired(
    values: NDArray[np.float64], reference: NDArray[np.float64], *, resamples: int = stats.RESAMPLES
) -> stats.PairedDifference:
    """Difference of two means over different items, each resampled by itself; otherwise as `stats.paired_bootstrap`."""
    rng = np.random.default_rng(0)
    means = [
        np.array([side[rng.integers(len(side), size=len(side))].mean() for _ in range(resamples)])
        for side in (values, reference)
    ]
    difference = means[0] - means[1]
    low, high = np.quantile(difference, (0.025, 0.975))
    below = np.count_nonzero(difference < 0) + np.count_nonzero(difference == 0) / 2
    p = 2 * (min(below, resamples - below) + 1) / (resamples + 2)
    mean = float(values.mean() - reference.mean())
    return stats.PairedDifference(mean, float(low), float(high), min(float(p), 1.0), len(values))


# ---------------------------------------------------------------------------------------------- reading, printing


def print_verdicts(lines: pd.DataFrame, console: Console | None = None) -> None:
    """The verdicts as a table."""
    console = console or Console()
    listing = Table(box=box.SIMPLE_HEAD, header_style="cyan", padding=(0, 1, 0, 0), pad_edge=False)
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
        listing.add_row(line.statement, f"[{styles[line.verdict]}]{verdict}[/]", effect, p, count, note)
    console.print(listing)


def save(lines: pd.DataFrame, samples: pd.DataFrame, folder: Path) -> None:
    """Write claims.csv and samples.parquet, each atomically."""
    buffer = io.BytesIO()
    samples.to_parquet(buffer, index=False)
    with place_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "claims.csv", lines.to_csv(index=False).encode())
        write_atomic(folder / "samples.parquet", buffer.getvalue())


def main(args: list[str] | None = None) -> int:
    """The command line: verdicts of a results folder. Exit code 2 where there are no results."""
    parser = argparse.ArgumentParser(prog="python -m harness.claims", description="Verdicts on the study's claims.")
    parser.add_argument("results", nargs="?", type=Path, default=Path("results"))
    parser.add_argument("--limited", action="store_true", help="take smoke runs in; their verdicts are marked")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write claims.csv and samples.parquet there")
    given = parser.parse_args(args)
    try:
        table = collect(given.results) if Store(given.results).cells() else read_table(given.results / "table.parquet")
        samples = read_samples(given.results)
        lines = verdicts(table, samples, given.limited)
        if given.save:
            save(lines, samples, given.save)
    except ConfigError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", soft_wrap=True)
        return 2
    print_verdicts(lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
