"""What of transformers' attention the executions build on: how an own implementation is put in, and the dense ones.

An implementation gets (module, query, key, value, attention_mask, **kwargs) and gives (outputs, weights or None); a
mask function gets the keywords of `sdpa_mask`. Models pick them by name: `using(model, name)`.

transformers loads all of its model code for these few names, in seconds: here that happens when a model is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["dense_attention", "dense_mask", "register", "replaceable", "using", "window"]

_OURS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # name -> (attention, mask)


def dense_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention over all entries: torch's, or written out where scores are capped softly (Gemma 2).

    query: [batch, heads, tokens, head_dim]. key, value: [batch, KV heads, keys, head_dim]. attention_mask: bool, True =
    seen, [batch, 1, tokens, keys], or None where causality is all. Returns ([batch, tokens, heads, head_dim], None).
    """
    cap = kwargs.get("softcap")
    if cap is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = cap * torch.tanh(query @ key.transpose(2, 3) * kwargs["scaling"] / cap)
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


def dense_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of `dense_attention`: transformers' own."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)


def replaceable(model: Any) -> bool:
    """Whether attention for one token in a kernel can stand in for the model's own: scores that are not capped."""
    return bool(model._supports_attention_backend) and getattr(model.config, "attn_logit_softcapping", None) is None


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Give an attention a name, by which `using` makes it known to transformers."""
    _OURS[name] = attention, mask


@contextmanager
def using(model: Any, name: str) -> Iterator[None]:
    """The model attends through the implementation of this name until the context ends."""
    from transformers import AttentionInterface, AttentionMaskInterface

    attention, mask = _OURS[name]
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def window(module: Any) -> int | None:
    """How many of the last entries a token of this attention module sees, itself included; None: all of them."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return getattr(getattr(module, "config", None), "sliding_window", None)
