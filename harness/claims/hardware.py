"""Whether active sets suit hardware, and what is left of it in time."""

from __future__ import annotations

import pandas as pd

from harness.claims.evidence import Evidence
from harness.claims.length import PROMPT_FIXED
from harness.claims.study import MissingEvidence, Study, need, numbers, rows_by_layer, used
from harness.results.collect import time_ratios

LEFT = 0.5  # share of a token's sparsity that a batch must leave, or it needs many more neurons


def _active(study: Study, metric: str) -> pd.DataFrame:
    """Rows of the affinity probe beside the density (`value_chance`), where that is no matter of course.

    A SwiGLU model's own neurons are all active, a prompt-fixed set never changes, and a random one says nothing.
    """
    rows = rows_by_layer(study, metric, probe="affinity", site="neurons")
    density = rows_by_layer(study, "density", probe="affinity", site="neurons")[["cell_id", "layer", "value"]]
    rows = rows.merge(density, on=["cell_id", "layer"], suffixes=("", "_chance"))
    return rows[(rows["value_chance"] < 0.99) & ~rows["method"].isin([*PROMPT_FIXED, "random"])]


def activations_are_inert(study: Study) -> Evidence:
    """Share of active neurons that the token before had active too, minus what chance would give, by layer.

    Chance: the tokens in random order, where that was counted; else every neuron as often as the others.
    """
    both = _active(study, "reuse_previous")
    need(both, "the affinity probe on cells whose neurons are not all active")
    shuffled = rows_by_layer(study, "reuse_shuffled", probe="affinity", site="neurons")[["cell_id", "layer", "value"]]
    both = both.merge(shuffled, on=["cell_id", "layer"], how="left", suffixes=("", "_shuffled"))
    both = both.assign(value_chance=both["value_shuffled"].fillna(both["value_chance"]))
    layers = both.groupby("layer")[["value", "value_chance"]].mean()
    note = f"reused {layers['value'].mean():.1%}, by chance {layers['value_chance'].mean():.1%}"
    ours, chance_ = numbers(layers["value"]), numbers(layers["value_chance"])
    return Evidence(ours, "layers", "share of active neurons", used(both["cell_id"]), reference=chance_, note=note)


def batch_unites(study: Study) -> Evidence:
    """Share of a token's sparsity that the largest batch loses, above `LEFT` of it, by layer.

    That a batch needs more neurons than a token is no matter of observation; how many more is.
    """
    union = _active(study, "union_batch")
    if union["batch"].nunique() < 2:
        raise MissingEvidence("the affinity probe's unions at two or more batch sizes, of neurons not all active")
    layers = union.pivot_table(index="layer", columns="batch", values="value").dropna()
    one, many = layers.columns.min(), layers.columns.max()
    lost = (layers[many] - layers[one]) / (1 - layers[one])
    note = (
        f"{layers[one].mean():.1%} of the neurons at batch {one}, {layers[many].mean():.1%} at batch {many}: "
        f"{lost.mean():.0%} of the sparsity is gone, {LEFT:.0%} were claimed"
    )
    return Evidence(numbers(lost) - LEFT, "layers", "share of a token's sparsity", used(union["cell_id"]), note=note)


def _kernel_times(study: Study) -> pd.DataFrame:
    """Paired time ratios of methods' own kernels to dense of their engine. Masked execution never counts."""
    rows = time_ratios(study.rows[study.rows["execution"] == "kernel"])
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
        f"{nominal.mean():.1%} of the blocks' bytes{_of_the_step(study, nominal.index)}, {saved.mean():.1%} of time; "
        f"slower than dense: {', '.join(slower) or 'none'}"
    )
    values, reference = numbers(nominal), numbers(saved)
    return Evidence(values, "cells", "share", used(nominal.index), reference=reference, note=note)


def _of_the_step(study: Study, cells: pd.Index) -> str:
    """What the skipped bytes are of all that a step reads, head and cache included, in words."""
    rows = study.rows[(study.rows["metric"] == "step_bytes") & study.rows["cell_id"].isin(cells)]
    rows = rows[rows["batch"] == rows["batch"].min()]
    asked = rows["sparsity_requested"].fillna(0) > 0
    kernel = rows[(rows["execution"] == "kernel") & asked].groupby("cell_id")["value"].mean()
    dense = rows[rows["execution"] == "dense"].groupby("cell_id")["value"].mean()
    share = (1 - kernel / dense).mean()
    return "" if pd.isna(share) else f", {share:.1%} of the step's with head and cache"
