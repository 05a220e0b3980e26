"""LLaMA and its kin: RMSNorm, rotary attention with grouped KV heads, gated MLP (Llama, Mistral, SmolLM2 …)."""

from __future__ import annotations

from typing import Any

from harness.model.view import Block, View

MODEL_TYPES = ("llama", "mistral", "sparsellama", "bamboo", "minicpm")


def view(model: Any) -> View:
    """The view of a `LlamaForCausalLM`-like model. Raises AttributeError if the modules are not as expected."""
    config = model.config
    blocks, norms = [], []
    for layer in model.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        blocks.append(
            Block(
                layer=layer,
                attn=attn,
                act=mlp.act_fn,
                act_at=(mlp, "act_fn"),
                q=attn.q_proj,
                k=attn.k_proj,
                v=attn.v_proj,
                o=attn.o_proj,
                gate=mlp.gate_proj,
                up=mlp.up_proj,
                down=mlp.down_proj,
            )
        )
        norms.append((layer.input_layernorm, layer.post_attention_layernorm))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return View(
        model=model,
        family="llama",
        blocks=blocks,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        d_model=config.hidden_size,
        d_ff=config.intermediate_size,
        activation=config.hidden_act,
        norms=norms,
        final_norm=model.model.norm,
    )
