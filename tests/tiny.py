"""Tiny random models, one a family, and what tests build from them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.view import View

VOCABULARY = 256


def make(family: str, vocabulary: int = VOCABULARY, **changes) -> torch.nn.Module:
    """A random model: llama and mistral with grouped KV heads, opt with a plain ReLU MLP and biases."""
    torch.manual_seed(0)
    if family == "opt":
        config = OPTConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            word_embed_proj_dim=64,
            max_position_embeddings=512,
            dropout=0.0,
            **changes,
        )
        model = OPTForCausalLM(config)
    else:
        config_class, model_class = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
        }[family]
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        }
        if family == "mistral":
            sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None}
        model = model_class(config_class(vocab_size=vocabulary, **(sizes | changes)))
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
