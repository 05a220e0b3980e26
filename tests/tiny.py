"""Tiny random models, one a family, and what tests build from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.view import View

VOCABULARY = 256


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}  # wider together than the model
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SHARED = {  # the last two of four blocks read the K and V of the two before, one of the four has a top-k of its own
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.8, 0.0, 0.0, 0.0],
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
}  # fmt: skip
ROUTED = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
PLAIN = {"num_key_value_heads": None, "hidden_act": "gelu"}  # None drops a key

# Family -> transformers' name for its classes and what differs from SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "mistral": (
        "Mistral",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None}
        | {"tie_word_embeddings": True},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", OWN_HEADS),
    "gemma": ("Gemma", OWN_HEADS),
    "gemma2": ("Gemma2", OWN_HEADS | WINDOW | {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3Text", OWN_HEADS | WINDOW | {"query_pre_attn_scalar": 16}),
    "gemma3n": ("Gemma3nText", OWN_HEADS | SHARED),
    "phi3": ("Phi3", {"pad_token_id": None}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "pad_token_id": None}),
    "gpt_neox": ("GPTNeoX", PLAIN),
    "falcon": (
        "Falcon",
        {"intermediate_size": None, "num_key_value_heads": None, "ffn_hidden_size": 128, "activation": "gelu"}
        | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "opt": (
        "OPT",
        {"intermediate_size": None, "num_key_value_heads": None}
        | {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", OWN_HEADS | ROUTED),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64}),
}
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")


def make(family: str, vocabulary: int = VOCABULARY, **changes) -> torch.nn.Module:
    """A random model: grouped KV heads where the family has them; biases and norms that are not zero and one."""
    torch.manual_seed(0)
    name, own = FAMILIES[family]
    sizes = {key: value for key, value in (SIZES | own).items() if value is not None or SIZES.get(key) is None}
    config = getattr(transformers, f"{name}Config")(vocab_size=vocabulary, **(sizes | changes))
    # Gemma 2 caps attention scores, which torch's own attention can't
    attention = "eager" if family == "gemma2" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms at zero and one would hide mistakes
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4)
    return model.eval().requires_grad_(False)


def view(family: str, **changes) -> View:
    """The view of a tiny random model."""
    return view_of(
        make(family, **changes), name=f"tiny-{family}", fingerprint=f"tiny-{family}-{sorted(changes.items())}"
    )


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def calibration(view_: View) -> Calibration:
    """A little random calibration text."""
    return Calibration(view_, tokens(8, 64, seed=2).split(4))


def save_with_tokenizer(folder: Path, tokenizer, family: str = "llama", **changes) -> Path:
    """A local model folder as users have them: a tiny random model with a real tokenizer."""
    make(family, vocabulary=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
