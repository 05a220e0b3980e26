"""SwiGLU beside ReLU at equal sparsity, and how sparse each is by itself."""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.claims.evidence import Evidence, by_stretch
from harness.claims.pairs import EQUAL_SPARSITY, equally_sparse, gaps, matched_models, on_models, slopes
from harness.claims.study import MissingEvidence, Study, need, numbers, rows_by_layer, used
from harness.results.collect import ACHIEVED

CETT = "cett=0.2"  # the study's error budget
TWO_MODELS = "cells of one method on a SwiGLU model and on its ReLU counterpart, equally sparse in the MLPs"


def _at_equal_sparsity(study: Study, kind: str, over: str) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """(gap by item and pair, the pairs, what was corrected in words): the residual difference in sparsity taken out.

    The nearest ReLU cell skips a little more or less than the SwiGLU cell. What that is worth, by the slope of the ReLU
    model's own mean loss between that cell and its neighbour, is added to the gap.
    """
    pairs = need(equally_sparse(study, kind), TWO_MODELS)
    gap = need(gaps(study, pairs, "swiglu", "relu", kind), f"{TWO_MODELS}, with {over} that both were scored on")
    pairs = pairs.loc[gap.columns]
    worth = []
    for pair in pairs.itertuples():
        here, there = (_mean_loss(study, cell, kind, gap.index) for cell in (pair.relu, pair.neighbour))
        worth.append(pair.more * (here - there) / pair.apart)
    more = numbers(pairs["more"])
    note = (
        f"sparsity matched within {np.abs(more).max():.1%} (ReLU {more.mean():+.2%} on average: "
        f"worth {np.mean(worth):+.2g}, corrected)"
    )
    return gap + np.array(worth), pairs, note


def _mean_loss(study: Study, cell: str | None, kind: str, items: pd.Index) -> float:
    """Mean loss on these items, as far as the cell has them; the dense model (None) loses nothing."""
    loss = None if cell is None else study.loss(cell, kind)
    return 0.0 if loss is None else float(loss[loss.index.isin(items)].mean())


def swiglu_loses_more_accuracy(study: Study) -> Evidence:
    """Loss of accuracy, SwiGLU minus ReLU, by item."""
    gap, pairs, corrected = _at_equal_sparsity(study, "accuracy", "items")
    swiglu, relu = (_share_lost(study, pairs[side], gap.index) for side in ("swiglu", "relu"))
    note = f"mean of {len(pairs)} pairs of cells; {corrected}; "
    note += f"of what the own dense model can do, SwiGLU loses {swiglu:.0%}, ReLU {relu:.0%}"
    cells, each = used(pairs["swiglu"], pairs["relu"]), on_models(gap, pairs["pair"], numbers)
    return Evidence(
        numbers(gap.mean(axis=1)),
        "items",
        "share of answers",
        cells,
        by_model=each.by_model,
        errors=each.errors,
        note=note,
    )


def _share_lost(study: Study, cells: pd.Series, items: pd.Index) -> float:
    """Accuracy lost over accuracy above chance, both summed over cells: a weaker model has less to lose."""
    lost = at_stake = 0.0
    for cell in cells:
        loss = study.loss(cell, "accuracy")
        assert loss is not None  # or there would be no gap
        lost += float(loss.reindex(items).mean())
        at_stake += float(study.at_stake(cell).reindex(items).mean())
    return lost / at_stake


def swiglu_loses_more_text(study: Study) -> Evidence:
    """Loss on running text, SwiGLU minus ReLU, by stretch of text."""
    gap, pairs, corrected = _at_equal_sparsity(study, "text", "text windows")
    note = f"mean of {len(pairs)} pairs of cells; {corrected}"
    cells = used(pairs["swiglu"], pairs["relu"])
    return by_stretch(study, gap, pairs["pair"], pairs["length"].iloc[0], cells, note)


def gap_widens(study: Study) -> Evidence:
    """Slope of the gap on running text over the achieved sparsity, by stretch of text."""
    gap, pairs, corrected = _at_equal_sparsity(study, "text", "text windows")
    rising = {
        pair: (group, slopes(gap[group.index], numbers(group["achieved"])))
        for pair, group in pairs.groupby(["pair", "method"])
        if group["achieved"].max() - group["achieved"].min() > EQUAL_SPARSITY
    }
    if not rising:
        raise MissingEvidence(f"{TWO_MODELS}, at two or more sparsities, with text windows")
    together = pd.concat([group for group, _ in rising.values()])
    slope = pd.concat({pair: slope for pair, (_, slope) in rising.items()}, axis=1)
    cells = used(together["swiglu"], together["relu"])
    by_level = gap[together.index].mean().groupby(together["achieved"].round(1)).mean()
    note = "gap by MLP sparsity: " + ", ".join(f"{level:.0%} {value:+.3f}" for level, value in by_level.items())
    names, length = [pair for pair, _ in rising], pairs["length"].iloc[0]
    unit = "nats/token for all of the sparsity"
    return by_stretch(study, slope, names, length, cells, f"{note}; {corrected}", unit)


def _natural(study: Study) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Achieved MLP sparsity at the study's CETT, layers x models, and the cells."""
    rows = rows_by_layer(study, ACHIEVED, site="mlp_hidden", method="cett", variant=CETT)
    rows = need(rows[rows["step_phase"] == "all"], f"cells of method cett with {CETT} and the sparsity probe")
    return rows.pivot_table(index="layer", columns="model", values="value"), used(rows["cell_id"])


def swiglu_less_sparse(study: Study) -> Evidence:
    """Natural sparsity at equal error, ReLU minus SwiGLU, by layer. Layers are all there are: a description."""
    natural, cells = _natural(study)
    pairs = list(matched_models(study.lines, natural.columns))
    if not pairs:
        raise MissingEvidence(f"method cett with {CETT} on a SwiGLU model and on its ReLU counterpart")
    gap = pd.DataFrame({f"{swiglu} and {relu}": natural[relu] - natural[swiglu] for swiglu, relu in pairs}).dropna()
    ranges = [f"{name} {m.mean():.1%} ({m.min():.1%} to {m.max():.1%} by layer)" for name, m in natural.items()]
    note = f"{'; '.join(ranges)}; published for LLaMA-3-8B: 67.29 %"
    by_model = gap.mean().to_dict()
    values = numbers(gap.mean(axis=1))
    return Evidence(values, "layers", "share of neurons", cells, drawn=False, by_model=by_model, note=note)


def sparsity_falls_with_depth(study: Study) -> Evidence:
    """Natural sparsity of SwiGLU models, early layers minus their mirror images at the end: a description."""
    natural, cells = _natural(study)
    activation = study.lines.drop_duplicates("model").set_index("model")["activation"].fillna("")
    models = [m for m in natural.columns if "relu" not in activation[m].lower()]
    if not models:
        raise MissingEvidence(f"method cett with {CETT} on a SwiGLU model")
    layers = natural[models].dropna()
    half, mean = len(layers) // 2, numbers(layers.mean(axis=1))
    note = f"first layer {mean[0]:.1%}, last {mean[-1]:.1%}; published for LLaMA-3-8B: over 99 % and about 10 %"
    falls = {m: float(layers[m].iloc[:half].mean() - layers[m].iloc[-half:].mean()) for m in models}
    early, late = mean[:half], mean[::-1][:half]
    return Evidence(
        early, "pairs of layers", "share of neurons", cells, reference=late, drawn=False, by_model=falls, note=note
    )
