"""What a transformers language model returns, for steps that do not run its own forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast


def output(logits: Tensor, cache: Any) -> CausalLMOutputWithPast:
    """The output of a causal language model with these logits [batch, tokens, vocabulary]."""
    from transformers.modeling_outputs import CausalLMOutputWithPast  # half a second, where a model is at hand anyway

    return CausalLMOutputWithPast(logits=logits, past_key_values=cache)
