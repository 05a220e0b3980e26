"""MiniCPM checkpoints (arXiv 2404.06395), among them MiniCPM-S and the pairs of Sparsing Law (arXiv 2411.02335).

A MiniCPM is a LLaMA with three constants (muP): embeddings times `scale_emb`, what attention and MLP add to the
residual stream times `scale_depth / sqrt(layers)`, final hidden states over `hidden_size / dim_model_base`.
Transformers has no class for it and the code beside the weights is never run. Here the constants are multiplied into
the weights on load, after which the model is an ordinary LLaMA for every method and kernel.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import nn

ARCHITECTURE = "MiniCPMForCausalLM"


@cache
def register() -> Any:
    """Make `AutoConfig` and `AutoModelForCausalLM` load `minicpm` folders. Returns the config class."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from harness.model.families.prosparse import FatReLU

    class MiniCPMConfig(LlamaConfig):
        """hidden_act_param: FATReLU's threshold where hidden_act is fatrelu (0.03 in MiniCPM-S-1B)."""

        model_type = "minicpm"
        tie_word_embeddings: bool = True
        scale_emb: float = 1.0
        scale_depth: float = 1.0
        dim_model_base: float = 1.0
        hidden_act_param: float = 0.0
        attention_type: str = "vanilla"
        ffn_type: str = "vanilla"

    class MiniCPMForCausalLM(LlamaForCausalLM):
        """LLaMA with MiniCPM's constants in its weights."""

        config_class = MiniCPMConfig

        def __init__(self, config: MiniCPMConfig) -> None:
            if (config.attention_type, config.ffn_type) != ("vanilla", "vanilla"):
                kinds = f"attention {config.attention_type!r} and MLP {config.ffn_type!r}"
                raise ValueError(f"a MiniCPM of {kinds} is no LLaMA: only 'vanilla' ones are supported")
            super().__init__(config)
            if config.hidden_act == "fatrelu":
                for layer in self.model.layers:
                    layer.mlp.act_fn = FatReLU(config.hidden_act_param)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            """As every from_pretrained, then the constants are folded in."""
            model = super().from_pretrained(*args, **kwargs)
            _fold(model)
            return model

    AutoConfig.register("minicpm", MiniCPMConfig)
    AutoModelForCausalLM.register(MiniCPMConfig, MiniCPMForCausalLM)
    return MiniCPMConfig


@torch.no_grad()
def _fold(model: Any) -> None:
    """Multiply the constants into the weights, in place, and set them to what changes nothing."""
    config = model.config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight:  # only the embedding is scaled
        head.weight = nn.Parameter(embedding.weight.clone())
        config.tie_word_embeddings = False
    embedding.weight.mul_(config.scale_emb)
    branch = config.scale_depth / math.sqrt(config.num_hidden_layers)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(branch)
        layer.mlp.down_proj.weight.mul_(branch)
    model.model.norm.weight.mul_(config.dim_model_base / config.hidden_size)
    config.scale_emb, config.scale_depth = 1.0, math.sqrt(config.num_hidden_layers)
    config.dim_model_base = float(config.hidden_size)
