"""Gemma 1 to 3, text: GeGLU, head dimensions of their own; from Gemma 2 on norms after both sublayers, and windows.

Gemma 2 also caps attention scores and logits softly; Gemma 3 normalises every head's q and k.
"""

from __future__ import annotations

from typing import Any

from harness.model.families import gated
from harness.model.view import View

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")


def view(model: Any) -> View:
    """The view of a `GemmaForCausalLM`, `Gemma2ForCausalLM` or `Gemma3ForCausalLM`."""
    family = model.config.model_type.removesuffix("_text")
    return gated.view(
        model,
        family,
        map(gated.block, model.model.layers),
        mlp_norm="post_attention_layernorm" if family == "gemma" else "pre_feedforward_layernorm",
        logit_cap=getattr(model.config, "final_logit_softcapping", None),
        limits={"recompute": f"Gemma 3 {gated.NORMED_KEYS}"} if family == "gemma3" else {},
    )
