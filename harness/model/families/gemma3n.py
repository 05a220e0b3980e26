"""Gemma 3n, text (E2B, E4B): Gemma 3 blocks among several residual streams, the last without K and V of their own.

AltUp keeps several residual streams and hands one, the active one, to attention and MLP: that is the residual stream
that methods see. What a block reads beside its projections (AltUp's coefficients and router, LAuReL's two factors, the
gate and projection of the per-layer input) stays dense and is counted: every token reads it. The projections around the
blocks (AltUp's, the per-layer inputs') are no part of a share, as the head is none.

Blocks with a statistical top-k have it under every method: it belongs to the dense model, whose gates it sets to exact
zeros, counted as such wherever a method looks.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.errors import UnsupportedError
from harness.model.families import gated
from harness.model.view import View

MODEL_TYPES = ("gemma3n_text",)
WITH_TOWERS = "gemma3n"  # the model type of checkpoints that read images and sound too


def text_config(source: str, revision: str | None) -> Any:
    """The config of the language model in a checkpoint that has towers beside it; its weights load by that alone."""
    from transformers import Gemma3nTextConfig

    return Gemma3nTextConfig.from_pretrained(source, revision=revision)


def view(model: Any) -> View:
    """The view of a `Gemma3nForCausalLM`. Raises UnsupportedError where MLPs differ in width."""
    layers = model.model.layers
    if len({layer.mlp.down_proj.in_features for layer in layers}) > 1:
        raise UnsupportedError("this Gemma 3n has blocks whose MLPs differ in width: they can't be compared")
    blocks = [
        gated.block(
            layer,
            own_keys=not layer.self_attn.is_kv_shared_layer,
            stream=layer.input_layernorm,
            own_topk=layer.mlp.activation_sparsity,
        )
        for layer in layers
    ]
    projections = sum(module.weight.numel() for _, module in blocks[0].projections())
    around = [model.model.per_layer_model_projection, model.model.altup_projections]
    shared = (
        "the last blocks of Gemma 3n read the K and V of earlier ones: an entry is not one block's alone to leave out"
    )
    return gated.view(
        model,
        "gemma3n",
        blocks,
        mlp_norm="pre_feedforward_layernorm",
        logit_cap=model.config.final_logit_softcapping,
        beside=linear_weights(layers[0]) - projections,
        around=sum(map(linear_weights, (*around, model.model.altup_unembed_projections))),
        limits={
            "entries": shared,
            "recompute": f"Gemma 3n {gated.NORMED_KEYS}",
            "norms": "the norm before Gemma 3n's attention makes the input of LAuReL too",
            "kernels": "no kernel runs the blocks of Gemma 3n, with what they have beside attention and MLP",
        },
    )


def linear_weights(module: nn.Module) -> int:
    """Weights of all linear layers in a module, biases aside."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
