"""TurboSparse-Mistral and Bamboo (arXiv 2406.05955): Mistral with dReLU, that is ReLU on both halves of the gated MLP.

Transformers has no class for their model type, `bamboo`, and the code beside the weights is never run. The weights
hold small predictors too, with which that code guesses the zeros; here zeros are counted as they come, without them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn


@cache
def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` load `bamboo` folders. Imports transformers' Mistral."""
    from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM
    from transformers.activations import ACT2FN

    class BambooConfig(MistralConfig):
        """hidden_act is always drelu: the published configs say relu, of each half."""

        model_type = "bamboo"

        def __post_init__(self, **kwargs: Any) -> None:
            super().__post_init__(**kwargs)
            self.hidden_act = "drelu"

    class BambooForCausalLM(MistralForCausalLM):
        """Mistral with ReLU on the up half too."""

        config_class = BambooConfig
        _keys_to_ignore_on_load_unexpected = [r"mlp\.predictor\."]

        def __init__(self, config: BambooConfig) -> None:
            super().__init__(config)
            for layer in self.model.layers:
                layer.mlp.up_proj.register_forward_hook(lambda _module, _inputs, output: torch.relu(output))

    ACT2FN["drelu"] = nn.ReLU  # the gate's half
    AutoConfig.register("bamboo", BambooConfig)
    AutoModelForCausalLM.register(BambooConfig, BambooForCausalLM)
