"""What a transformers language model returns, for steps that do not run its own forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


def output(logits: Tensor, cache: Any) -> CausalLMOutputWithPast:
    """The output of a causal language model with these logits [batch, tokens, vocabulary]."""
    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
