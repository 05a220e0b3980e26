"""The frame of a block on a GPU, for one token a sequence: norms, and attention with rotary embedding and cache write.

The projections between them are the module's own calls, with whatever hooks and kernels decide there. So what the fused
step can't run (harness/execution/fused_step.py knows fixed thresholds alone) shares its small parts with it: in a CUDA
graph of the module as it is, they would be some forty launches a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StaticCache

from harness.errors import UnsupportedError
from harness.execution.fused_batch import MAX_BATCH, fits, norm_forward
from harness.execution.fused_step import advance, decode_attention, no_frame
from harness.execution.layouts import replaced
from harness.model.view import View


@contextmanager
def framed(view: View) -> Iterator[None]:
    """While the context lasts, the norms and the attention of one-token steps with a `StaticCache` run on our kernels.

    Sequences are of one length, without padding; batches above 256 take the module's own path. Raises UnsupportedError
    where they do not fit the model. Its activation may be any.
    """
    reason = no_frame(view)
    if reason is not None:
        raise UnsupportedError(reason)
    with ExitStack() as stack:
        stack.enter_context(decode_attention(view.model))
        for layer, (block, norms) in enumerate(zip(view.blocks, view.norms, strict=True)):
            for norm in norms:
                stack.enter_context(replaced(norm, norm_forward(norm)))
            stack.enter_context(replaced(block.attn, _attention_forward(view, layer)))
        assert view.final_norm is not None
        stack.enter_context(replaced(view.final_norm, norm_forward(view.final_norm)))
        yield


def _attention_forward(view: View, layer: int) -> Callable[..., Any]:
    block = view.blocks[layer]
    own = block.attn.forward
    assert block.q is not None and block.k is not None and block.v is not None
    q, k, v = block.q, block.k, block.v

    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        from kernels.cuda.attention import attend_step

        cache = kwargs.get("past_key_values")
        if not fits(hidden_states) or not isinstance(cache, StaticCache):
            return own(hidden_states, **kwargs)
        own_cache = cache.layers[layer]
        qkv = torch.cat([q(hidden_states), k(hidden_states), v(hidden_states)], dim=-1)[:, 0]
        heads = qkv.new_empty(len(qkv), view.n_heads * view.head_dim)
        cos, sin = kwargs["position_embeddings"]
        attend_step(
            qkv, cos, sin, own_cache.keys, own_cache.values, own_cache.cumulative_length, heads,
            n_heads=view.n_heads, scale=cast(float, block.attn.scaling),
        )  # fmt: skip
        advance(own_cache)
        return block.o(heads[:, None]), None

    forward.fused = MAX_BATCH  # type: ignore[attr-defined]
    return forward
