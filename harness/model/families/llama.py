"""LLaMA and its kin: RMSNorm, rotary attention with grouped KV heads, gated MLP (Llama, Mistral, SmolLM2 …)."""

from __future__ import annotations

from typing import Any

from harness.model.families import gated
from harness.model.view import View

MODEL_TYPES = ("llama", "mistral", "sparsellama", "bamboo", "minicpm")


def view(model: Any) -> View:
    """The view of a `LlamaForCausalLM`-like model. Raises AttributeError if the modules are not as expected."""
    return gated.view(model, "llama", map(gated.block, model.model.layers))
