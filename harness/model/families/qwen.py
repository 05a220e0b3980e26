"""Qwen2 and Qwen2.5 (biases on q, k and v) and Qwen3 (every head's q and k normalised instead), else as LLaMA."""

from __future__ import annotations

from typing import Any

from harness.model.families import gated
from harness.model.view import View

MODEL_TYPES = ("qwen2", "qwen3")


def view(model: Any) -> View:
    """The view of a `Qwen2ForCausalLM` or `Qwen3ForCausalLM`."""
    family = model.config.model_type
    limits = {"recompute": f"Qwen3 {gated.NORMED_KEYS}"} if family == "qwen3" else {}
    return gated.view(model, family, map(gated.block, model.model.layers), limits=limits)
