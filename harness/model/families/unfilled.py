"""A model whose weights nobody has filled: what random ones are drawn into."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights


def unfilled(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model of this config on the device, its weights as the memory was."""
    with no_init_weights(), torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    made.tie_weights()
    return made
