"""Phi-3 and Phi-4 (mini): LLaMA with q, k, v in one layer and gate, up in another."""

from __future__ import annotations

from typing import Any

from harness.model.families import gated
from harness.model.families.fused import split
from harness.model.view import Block, View

MODEL_TYPES = ("phi3",)


def view(model: Any) -> View:
    """The view of a `Phi3ForCausalLM`. Its fused layers are taken apart: the weights become views of theirs."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide, narrow = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    neurons = config.intermediate_size
    blocks = []
    for layer in model.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        qkv = split(attn, "qkv_proj", {"q": wide, "k": narrow, "v": narrow})
        both = split(mlp, "gate_up_proj", {"gate": neurons, "up": neurons})
        q, k, v = qkv.parts()
        gate, up = both.parts()
        act_at = (mlp, "activation_fn")
        o, down = attn.o_proj, mlp.down_proj
        blocks.append(Block(layer, attn, mlp.activation_fn, act_at, q, k, v, o, gate, up, down))
    limits = {}
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        limits["recompute"] = "this Phi rotates a part of each head only, and kv=recompute knows whole heads"
    return gated.view(model, "phi3", blocks, limits=limits)
