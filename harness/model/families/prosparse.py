"""ProSparse checkpoints (arXiv 2402.13516): LLaMA with FATReLU, a ReLU whose threshold is above zero.

Their configs name a model type, `sparsellama`, that transformers does not have, and code to download and run for it.
That code is never run. Apart from the activation the architecture is LLaMA's, so this module gives transformers a local
class of that type; the adapter of `harness.model.families.llama` then serves it.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn


class FatReLU(nn.Module):
    """x where x > threshold, else 0; element-wise, dtype kept."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """X of any shape."""
        return torch.where(x > self.threshold, x, torch.zeros_like(x))


@cache
def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` load `sparsellama` folders. Imports transformers' LLaMA."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.activations import ACT2FN

    class ProSparseConfig(LlamaConfig):
        """hidden_act_param: FATReLU's threshold (0.01 in the published checkpoints)."""

        model_type = "sparsellama"
        hidden_act_param: float = 0.0

    class ProSparseForCausalLM(LlamaForCausalLM):
        """LLaMA with FATReLU's threshold set from the config."""

        config_class = ProSparseConfig

        def __init__(self, config: ProSparseConfig) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.act_fn = FatReLU(config.hidden_act_param)

    ACT2FN["fatrelu"] = FatReLU
    AutoConfig.register("sparsellama", ProSparseConfig)
    AutoModelForCausalLM.register(ProSparseConfig, ProSparseForCausalLM)
