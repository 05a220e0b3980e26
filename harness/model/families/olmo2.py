"""OLMo 2: norms only after the sublayers, and q and k normalised over all heads together."""

from __future__ import annotations

from typing import Any

from harness.model.families import gated
from harness.model.view import View

MODEL_TYPES = ("olmo2",)
JOINT = "normalises q and k over all heads together: a head that is not computed would change the others"


def view(model: Any) -> View:
    """The view of an `Olmo2ForCausalLM`. No norm comes before a sublayer."""
    limits = {"heads": f"OLMo 2 {JOINT}", "norms": "OLMo 2 has no norm before attention and MLP"}
    return gated.view(model, "olmo2", map(gated.block, model.model.layers), mlp_norm="", limits=limits)
