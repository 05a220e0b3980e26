"""What predicting neurons and heads costs."""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.claims.evidence import Evidence, by_stretch
from harness.claims.pairs import by_option, contrast, gaps, matched_models
from harness.claims.study import POLICY, Study, need, numbers, rows_by_layer, used

EQUAL_DENSITY = 0.02  # recall is compared at densities this near


def prediction_costs(study: Study) -> Evidence:
    """Loss on running text with a trained predictor minus with perfect choices at the same k, by stretch of text."""
    dejavu = by_option(study.select("dejavu"), "predictor", "serial", ("rank", "epochs"))
    routed = by_option(study.select("moefication"), "router", "mlp", ("epochs",))
    pairs = [contrast(dejavu, "serial", "oracle"), contrast(routed, "mlp", "oracle")]
    pairs[1]["setting"] += len(pairs[0]) + 1  # other settings than the first
    both = need(pd.concat(pairs, ignore_index=True), "dejavu with predictor=serial beside predictor=oracle")
    gap = need(gaps(study, both, "cell_id_worse", "cell_id_better", "text"), "text windows of dejavu and its oracle")
    both = both.loc[gap.columns]
    losses = [study.loss(cell, "text") for cell in both["cell_id_worse"]]
    whole = np.mean([loss.mean() for loss in losses if loss is not None])
    share = gap.mean().mean() / whole if whole > 0 else np.nan
    note = f"{share:.0%} of the loss is due to prediction" if np.isfinite(share) else ""
    cells = used(both["cell_id_worse"], both["cell_id_better"])
    return by_stretch(study, gap, both["model"], both["length"].iloc[0], cells, note)


def swiglu_harder_to_predict(study: Study) -> Evidence:
    """Recall of neurons at matched density, ReLU minus SwiGLU, by layer. Layers are all there are: a description.

    Where more are kept than a ReLU has active, finding them is easier for there being fewer; the area under the ROC
    curve, told in the note, does not depend on that.
    """
    recall = rows_by_layer(study, "recall", probe="predictivity", site="neurons")
    density = rows_by_layer(study, "density", probe="predictivity", site="neurons")[["cell_id", "layer", "value"]]
    recall = recall.merge(density, on=["cell_id", "layer"], suffixes=("", "_density"))
    recall = recall[~recall["variant"].fillna("").str.contains("oracle|random")]
    recall = recall.assign(variant=recall["variant"].fillna(""))
    matched = []
    for swiglu, relu in matched_models(study.lines, set(recall["model"])):
        parts = [recall[recall["model"] == model] for model in (relu, swiglu)]
        keys = ["method", "variant", "sparsity_requested", "layer", *POLICY]
        both = parts[0].merge(parts[1], on=keys, suffixes=("_relu", "_swiglu")).assign(pair=f"{swiglu} and {relu}")
        matched.append(both[(both["value_density_relu"] - both["value_density_swiglu"]).abs() <= EQUAL_DENSITY])
    missing = "predictivity of one predictor on a SwiGLU model and on its ReLU counterpart, at equal density"
    both = need(pd.concat(matched) if matched else pd.DataFrame(), missing)
    layers = both.groupby("layer")[["value_relu", "value_swiglu"]].mean()
    note = f"recall {layers['value_relu'].mean():.1%} on ReLU, {layers['value_swiglu'].mean():.1%} on SwiGLU"
    cells = used(both["cell_id_relu"], both["cell_id_swiglu"])
    auc = rows_by_layer(study, "auc", probe="predictivity", site="neurons").groupby("cell_id")["value"].mean()
    ranked = [auc.reindex(both[f"cell_id_{kind}"].unique()).mean() for kind in ("relu", "swiglu")]
    if not any(map(pd.isna, ranked)):
        note += f"; area under the ROC curve {ranked[0]:.3f} and {ranked[1]:.3f}"
    difference = (both["value_relu"] - both["value_swiglu"]).groupby(both["pair"]).mean()
    ours, theirs = numbers(layers["value_relu"]), numbers(layers["value_swiglu"])
    return Evidence(
        ours, "layers", "recall", cells, reference=theirs, drawn=False, by_model=difference.to_dict(), note=note
    )


def lookahead_worse(study: Study) -> Evidence:
    """Loss on running text with look-ahead predictors minus with serial ones, by stretch of text.

    How much less they find, recall by site, is told in the note: a mean over layers, which no test can be made of.
    """
    lines = by_option(study.select("dejavu"), "predictor", "serial", ("lookahead", "rank", "epochs"))
    words = "dejavu with predictor=serial beside predictor=lookahead"
    pairs = need(contrast(lines, "lookahead", "serial"), words)
    gap = need(gaps(study, pairs, "cell_id_worse", "cell_id_better", "text"), f"{words}, with text windows")
    pairs = pairs.loc[gap.columns]
    cells = used(pairs["cell_id_worse"], pairs["cell_id_better"])
    return by_stretch(study, gap, pairs["model"], pairs["length"].iloc[0], cells, _recall_lost(study))


def _recall_lost(study: Study) -> str:
    recall = rows_by_layer(study, "recall", probe="predictivity")
    recall = by_option(recall[recall["method"] == "dejavu"], "predictor", "serial", ("lookahead", "rank", "epochs"))
    keys = ["model", "rest", "sparsity_requested", "site"]
    by_choice = recall.pivot_table(index=keys, columns="choice", values="value")
    if not {"serial", "lookahead"} <= set(by_choice):
        return ""
    by_site = (by_choice["lookahead"] - by_choice["serial"]).dropna().groupby("site").mean()
    return "recall against serial: " + ", ".join(f"{site} {value:+.3f}" for site, value in by_site.items())
