"""SwiGLU beside ReLU at equal sparsity, and how sparse each is by itself."""

from __future__ import annotations

import pandas as pd

from harness.claims.evidence import Evidence
from harness.claims.study import (
    EQUAL_SPARSITY,
    MissingEvidence,
    Study,
    equally_sparse,
    gaps,
    matched_models,
    need,
    numbers,
    rows_by_layer,
    slopes,
    used,
)
from harness.results.collect import ACHIEVED

CETT = "cett=0.2"  # the study's error budget
TWO_MODELS = "cells of one method on a SwiGLU model and on its ReLU counterpart, equally sparse in the MLPs"


def _loses_more(study: Study, kind: str, unit: str, over: str) -> Evidence:
    pairs = need(equally_sparse(study, kind), TWO_MODELS)
    gap = need(gaps(study, pairs, "swiglu", "relu", kind), f"{TWO_MODELS}, with {over} that both were scored on")
    pairs = pairs.loc[gap.columns]
    by_model = gap.mean().groupby(pairs["pair"]).mean()
    note = ", ".join(f"{pair}: {value:+.4f}" for pair, value in by_model.items())
    if kind == "accuracy":
        swiglu, relu = (_share_lost(study, pairs[side], gap.index) for side in ("swiglu", "relu"))
        note += f"; of what the own dense model can do, SwiGLU loses {swiglu:.0%}, ReLU {relu:.0%}"
    cells = used(pairs["swiglu"], pairs["relu"])
    return Evidence(numbers(gap.mean(axis=1)), over, unit, cells, note=f"mean of {len(pairs)} pairs of cells; {note}")


def _share_lost(study: Study, cells: pd.Series, items: pd.Index) -> float:
    """Accuracy lost over accuracy above chance, both summed over cells: a weaker model has less to lose."""
    lost = able = 0.0
    for cell in cells:
        loss = study.loss(cell, "accuracy")
        assert loss is not None  # or there would be no gap
        lost += float(loss.reindex(items).mean())
        able += float(study.able(cell).reindex(items).mean())
    return lost / able


def swiglu_loses_more_accuracy(study: Study) -> Evidence:
    """Loss of accuracy, SwiGLU minus ReLU, by item."""
    return _loses_more(study, "accuracy", "share of answers", "items")


def swiglu_loses_more_text(study: Study) -> Evidence:
    """Loss on running text, SwiGLU minus ReLU, by window."""
    return _loses_more(study, "text", "nats/token", "text windows")


def gap_widens(study: Study) -> Evidence:
    """Slope of the gap on running text over the achieved sparsity, by window."""
    pairs = need(equally_sparse(study, "text"), TWO_MODELS)
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
    by_level = gap[together.index].mean().groupby(together["achieved"].round(1)).mean()
    note = "gap by MLP sparsity: " + ", ".join(f"{level:.0%} {value:+.3f}" for level, value in by_level.items())
    return Evidence(numbers(slope), "text windows", "nats/token for all of the sparsity", cells, note=note)


def _natural(study: Study) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Achieved MLP sparsity at the study's CETT, layers x models, and the cells."""
    rows = rows_by_layer(study, ACHIEVED, site="mlp_hidden", method="cett", variant=CETT)
    rows = need(rows[rows["step_phase"] == "all"], f"cells of method cett with {CETT} and the sparsity probe")
    return rows.pivot_table(index="layer", columns="model", values="value"), used(rows["cell_id"])


def swiglu_less_sparse(study: Study) -> Evidence:
    """Natural sparsity at equal error, ReLU minus SwiGLU, by layer."""
    natural, cells = _natural(study)
    pairs = list(matched_models(study.lines, natural.columns))
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
