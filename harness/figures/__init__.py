"""Figures: each is one function from the collected table to a matplotlib Figure. Nothing here measures.

What may be drawn: measured rows whose status is ok. Rows of a limited run are left out; with `limited=True`
they are drawn under a mark that says so. Masked execution never counts as speed. Rows of different models or
phase policies never share a panel. Cells that differ in the seed alone are drawn as their mean. A table with
nothing to draw raises `ConfigError`.
"""

from harness.figures import draw
from harness.figures.cache import KV_MODES, KV_ZEROS, kv_against_length, kv_modes, prompt_fixed_against_length
from harness.figures.draw import FIGURES, OF_VERDICTS, committed, draw_all, load, main, only_limited, save
from harness.figures.forest import effects_by_model
from harness.figures.latency import latency_against_load, nominal_against_measured, pareto
from harness.figures.literature import published_against_measured
from harness.figures.quality import (
    flips,
    predicted_against_oracle,
    quality_against_sparsity,
    swiglu_against_relu,
    truncation,
)
from harness.figures.size import loss_by_size
from harness.figures.sparsity import (
    achieved_by_layer,
    experts_by_text,
    magnitudes,
    natural_by_layer,
    recall_by_layer,
    requested_against_achieved,
    reuse_and_union,
    skippable,
    thresholds_by_layer,
)
from harness.figures.style import FRONTIER, STYLE

__all__ = [
    "FIGURES",
    "FRONTIER",
    "OF_VERDICTS",
    "KV_MODES",
    "KV_ZEROS",
    "STYLE",
    "achieved_by_layer",
    "committed",
    "draw",
    "draw_all",
    "effects_by_model",
    "experts_by_text",
    "flips",
    "kv_against_length",
    "kv_modes",
    "latency_against_load",
    "load",
    "loss_by_size",
    "magnitudes",
    "main",
    "natural_by_layer",
    "nominal_against_measured",
    "only_limited",
    "pareto",
    "predicted_against_oracle",
    "prompt_fixed_against_length",
    "published_against_measured",
    "quality_against_sparsity",
    "recall_by_layer",
    "requested_against_achieved",
    "reuse_and_union",
    "save",
    "skippable",
    "swiglu_against_relu",
    "thresholds_by_layer",
    "truncation",
]
