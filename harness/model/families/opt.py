"""OPT: LayerNorm with biases, learned positions, one KV head a query head, a plain ReLU MLP. The ReLU control."""

from __future__ import annotations

from typing import Any

from harness.model.view import Block, View

MODEL_TYPES = ("opt",)


def view(model: Any) -> View:
    """The view of an `OPTForCausalLM`. Its MLP works on [batch * tokens, width]; the harness restores the shape."""
    config = model.config
    decoder = model.model.decoder
    blocks, norms = [], []
    for layer in decoder.layers:
        attn = layer.self_attn
        blocks.append(
            Block(
                layer=layer,
                attn=attn,
                act=layer.activation_fn,
                act_at=(layer, "activation_fn"),
                q=attn.q_proj,
                k=attn.k_proj,
                v=attn.v_proj,
                o=attn.out_proj,
                gate=None,
                up=layer.fc1,
                down=layer.fc2,
            )
        )
        norms.append((layer.self_attn_layer_norm, layer.final_layer_norm))
    return View(
        model=model,
        family="opt",
        blocks=blocks,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        d_model=config.hidden_size,
        d_ff=config.ffn_dim,
        activation=config.activation_function,
        norms=norms,
        final_norm=decoder.final_layer_norm,
    )
