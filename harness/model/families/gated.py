"""Blocks as most families lay them out: q, k, v, o under self_attn, gate, up, down and the activation under mlp."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from harness.model.view import Block, View

# What K is made by, where it is not the plain projection with rotary positions: K cannot be made again from the input.
NORMED_KEYS = "normalises K after the projection, and entries rebuilt by kv=recompute would lack that"


def block(layer: nn.Module, own_keys: bool = True, **facts: Any) -> Block:
    """The block of a decoder layer. own_keys: it makes K and V. facts: further fields of Block.

    Raises AttributeError if the modules are not as expected.
    """
    attn: Any = layer.self_attn
    mlp: Any = layer.mlp
    return Block(
        layer=layer,
        attn=attn,
        act=mlp.act_fn,
        act_at=(mlp, "act_fn"),
        q=attn.q_proj,
        k=attn.k_proj if own_keys else None,
        v=attn.v_proj if own_keys else None,
        o=attn.o_proj,
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
        **facts,
    )


def view(
    model: Any,
    family: str,
    blocks: Iterable[Block],
    mlp_norm: str = "post_attention_layernorm",
    **facts: Any,
) -> View:
    """The view of a model whose config has the usual names. facts: fields of View that differ."""
    config = model.config
    found = list(blocks)
    usual = {
        "model": model,
        "family": family,
        "blocks": found,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "d_model": config.hidden_size,
        "d_ff": found[0].down.in_features,
        "activation": getattr(config, "hidden_activation", None) or config.hidden_act,
        "norms": [(b.layer.input_layernorm, getattr(b.layer, mlp_norm)) for b in found] if mlp_norm else [],
        "final_norm": model.model.norm,
    }
    return View(**(usual | facts))
