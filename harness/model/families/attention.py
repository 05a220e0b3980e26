"""What of transformers' attention the executions build on: how an own implementation is put in, and the dense ones.

An implementation gets (module, query, key, value, attention_mask, **kwargs) and gives (outputs, weights or None); a
mask function gets the keywords of `sdpa_mask`. Models pick them by name: `using(model, name)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward as dense_attention
from transformers.masking_utils import sdpa_mask as dense_mask

__all__ = ["dense_attention", "dense_mask", "register", "using"]


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make an attention known under a name."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


@contextmanager
def using(model: Any, name: str) -> Iterator[None]:
    """The model attends through the implementation of this name until the context ends."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
