"""GPT-NeoX and Pythia: LayerNorm, attention and MLP side by side, a plain GELU MLP, q, k, v fused head by head."""

from __future__ import annotations

from typing import Any

from harness.model.families.fused import split
from harness.model.view import Block, View

MODEL_TYPES = ("gpt_neox",)


def view(model: Any) -> View:
    """The view of a `GPTNeoXForCausalLM`. Its fused layer is taken apart, the rows of each part brought together."""
    config, width = model.config, model.config.hidden_size
    blocks, norms = [], []
    for layer in model.gpt_neox.layers:
        attn, mlp = layer.attention, layer.mlp
        qkv = split(attn, "query_key_value", dict.fromkeys("qkv", width), groups=config.num_attention_heads)
        q, k, v = qkv.parts()
        blocks.append(
            Block(
                layer=layer,
                attn=attn,
                act=mlp.act,
                act_at=(mlp, "act"),
                q=q,
                k=k,
                v=v,
                o=attn.dense,
                gate=None,
                up=mlp.dense_h_to_4h,
                down=mlp.dense_4h_to_h,
            )
        )
        norms.append((layer.input_layernorm, layer.post_attention_layernorm))
    return View(
        model=model,
        family="gpt_neox",
        blocks=blocks,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads,
        head_dim=width // config.num_attention_heads,
        d_model=width,
        d_ff=config.intermediate_size,
        activation=config.hidden_act,
        norms=norms,
        final_norm=model.gpt_neox.final_layer_norm,
        limits={"recompute": "GPT-NeoX rotates a part of each head only, and kv=recompute knows whole heads"},
    )
