"""How much memory a model takes, from its config alone, and whether there is as much: said before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from harness.errors import ConfigError

GB = 1e9


@dataclass(frozen=True)
class Need:
    """Bytes: of the weights, and of what one forward pass holds at its peak."""

    weights: int
    work: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.work


def need(config: Any, dtype: torch.dtype, tokens: int) -> Need:
    """What a model of this config takes in a pass over `tokens` tokens with logits for each of them.

    The weights are those of the module, made without memory; tied ones count once. Work is the logits as the model
    gives them and their float32 log-probabilities (with the float32 copy that makes them), and in a block the widest
    of its activations: the MLP's gate, its activation, up and their product.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * text.hidden_size
    inner = max(inner) if isinstance(inner, list) else inner
    block = tokens * (4 * inner + 4 * text.hidden_size) * dtype.itemsize
    logits = tokens * text.vocab_size * (dtype.itemsize + 4 + 4)
    return Need(weights, max(block, logits))


def free(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check(name: str, wanted: Need, device: torch.device, spread: bool = False) -> None:
    """Raise ConfigError where a model needs more than there is. spread: over all GPUs."""
    there = free(device)
    if spread and device.type == "cuda":
        there = sum(free(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))
    if wanted.total > there:
        raise ConfigError(
            f"model {name} needs about {wanted.total / GB:.1f} GB ({wanted.weights / GB:.1f} of them weights) and "
            f"{there / GB:.1f} GB are free on {device}: take a smaller dtype or model, or a larger machine"
        )
