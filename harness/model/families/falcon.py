"""Falcon: LayerNorm, attention and MLP side by side, a plain GELU MLP, q, k, v fused by KV group, one group or few."""

from __future__ import annotations

from typing import Any

from harness.model.families.fused import split
from harness.model.view import Block, View

MODEL_TYPES = ("falcon",)


def view(model: Any) -> View:
    """The view of a `FalconForCausalLM`. Its fused layer is taken apart, the rows of each part brought together."""
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    few = config.new_decoder_architecture or not config.multi_query
    kv_heads = (config.num_kv_heads if config.new_decoder_architecture else heads) if few else 1
    narrow = kv_heads * (width // heads)
    blocks, norms = [], []
    for layer in model.transformer.h:
        attn, mlp = layer.self_attention, layer.mlp
        q, k, v = split(attn, "query_key_value", {"q": width, "k": narrow, "v": narrow}, groups=kv_heads).parts()
        up, down = mlp.dense_h_to_4h, mlp.dense_4h_to_h
        blocks.append(Block(layer, attn, mlp.act, (mlp, "act"), q, k, v, attn.dense, None, up, down))
        if hasattr(layer, "ln_attn"):
            norms.append((layer.ln_attn, layer.ln_mlp))
        else:
            norms.append((layer.input_layernorm, getattr(layer, "post_attention_layernorm", layer.input_layernorm)))
    return View(
        model=model,
        family="falcon",
        blocks=blocks,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=width // heads,
        d_model=width,
        d_ff=config.ffn_hidden_size,
        activation=config.activation,
        norms=norms,
        final_norm=model.transformer.ln_f,
        limits={"attention": "Falcon's attention in transformers has no place for another one"},
    )
