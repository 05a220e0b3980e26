"""What predicting neurons and heads costs."""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.claims.evidence import Evidence
from harness.claims.study import (
    POLICY,
    Study,
    by_option,
    contrast,
    gaps,
    matched_models,
    need,
    numbers,
    rows_by_layer,
    used,
)

EQUAL_DENSITY = 0.02  # recall is compared at densities this near


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
    """Recall of neurons at matched density, ReLU minus SwiGLU, by layer.

    Where more are kept than a ReLU has active, finding them is easier for there being fewer; the area under the ROC
    curve, told in the note, does not depend on that.
    """
    recall = rows_by_layer(study, "recall", probe="predictivity", site="neurons")
    density = rows_by_layer(study, "density", probe="predictivity", site="neurons")[["cell_id", "layer", "value"]]
    recall = recall.merge(density, on=["cell_id", "layer"], suffixes=("", "_density"))
    recall = recall[~recall["variant"].fillna("").str.contains("oracle|random")]
    recall = recall.assign(variant=recall["variant"].fillna(""))
    found = []
    for swiglu, relu in matched_models(study.lines, set(recall["model"])):
        parts = [recall[recall["model"] == model] for model in (relu, swiglu)]
        keys = ["method", "variant", "sparsity_requested", "layer", *POLICY]
        both = parts[0].merge(parts[1], on=keys, suffixes=("_relu", "_swiglu"))
        found.append(both[(both["value_density_relu"] - both["value_density_swiglu"]).abs() <= EQUAL_DENSITY])
    missing = "predictivity of one predictor on a SwiGLU model and on its ReLU counterpart, at equal density"
    both = need(pd.concat(found) if found else pd.DataFrame(), missing)
    layers = both.groupby("layer")[["value_relu", "value_swiglu"]].mean()
    note = f"recall {layers['value_relu'].mean():.1%} on ReLU, {layers['value_swiglu'].mean():.1%} on SwiGLU"
    cells = used(both["cell_id_relu"], both["cell_id_swiglu"])
    auc = rows_by_layer(study, "auc", probe="predictivity", site="neurons").groupby("cell_id")["value"].mean()
    ranked = [auc.reindex(both[f"cell_id_{kind}"].unique()).mean() for kind in ("relu", "swiglu")]
    if not any(map(pd.isna, ranked)):
        note += f"; area under the ROC curve {ranked[0]:.3f} and {ranked[1]:.3f}"
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
