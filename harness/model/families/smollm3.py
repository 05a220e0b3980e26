"""SmolLM3: LLaMA without rotary positions in every fourth block."""

from __future__ import annotations

from typing import Any

from harness.model.families import gated
from harness.model.view import View

MODEL_TYPES = ("smollm3",)


def view(model: Any) -> View:
    """The view of a `SmolLM3ForCausalLM`."""
    why = "SmolLM3 has blocks without rotary positions, and entries rebuilt by kv=recompute would have them"
    return gated.view(model, "smollm3", map(gated.block, model.model.layers), limits={"recompute": why})
