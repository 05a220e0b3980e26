"""Attention that leaves out blocks of the KV cache whose scores are negligible: masked execution, the definition.

All of K is read to know the scores; of a block that is left out, V is not. With grouped queries a block stays when any
query head of its group needs it. Blocks are counted from a sequence's own first token, so that padding moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from harness.execution import masked_heads
from harness.model.families import attention
from harness.model.step import Step
from harness.model.view import View

CHUNK = 128  # queries whose scores are in memory at a time

# (layer, gaps [batch, KV heads, tokens, blocks], step) -> bool of that shape, True = kept. A gap is the largest score
# of a block less the largest so far in the order of the cache, its own included (so at most 0), of the query head in
# the group that comes nearest; -inf where the token sees nothing of the block.
Decide = Callable[[int, Tensor, Step], Tensor]


@contextmanager
def skipping(view: View, block: int, decide: Decide) -> Iterator[None]:
    """Leave out the blocks of `block` entries that `decide` does not keep, until the context ends."""
    with masked_heads.installed(Blocks(view, block, decide)):
        yield


class Blocks:
    """What attends while blocks are left out."""

    def __init__(self, view: View, block: int, decide: Decide) -> None:
        self.view, self.block, self.decide = view, block, decide

    def install(self) -> None:
        """Attend in the place of every layer's own attention."""
        masked_heads.attends(self.view, self.attend)

    def remove(self) -> None:
        """Give attention back."""
        masked_heads.attends(self.view, None)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """Heads' outputs [batch, tokens, heads, head_dim]; arguments as in `masked_heads.Heads.attend`."""
        step = self.view.tracker.step
        assert step is not None, "blocks are left out outside of a tracked forward pass"
        step = step.to(key.device)
        at = self._places(step, query.shape[2], key.shape[2])
        keep = self.decide(layer, self._gaps(query, key, attention_mask, at, **kwargs), step)
        if step.sparse is not None:
            keep = keep | ~step.sparse[:, None, :, None]
        # Back from blocks to the keys that they hold: [batch, KV heads, tokens, keys].
        block_of = (torch.arange(key.shape[2], device=key.device) - at[:, :1]) // self.block
        kept = keep.gather(-1, block_of[:, None, None].expand(*keep.shape[:3], -1))
        if self.view.ledger is not None:
            values = (attention_mask & kept).sum(-1).transpose(1, 2)
            self.view.ledger.attended(attention_mask.sum(-1).transpose(1, 2) + values)
        seen = attention_mask & kept.repeat_interleave(self.view.group_size, 1)
        module = self.view.blocks[layer].attn
        return attention.dense_attention(module, query, key, value, seen, **kwargs)[0]

    def _places(self, step: Step, queries: int, keys: int) -> Tensor:
        """Which key stands at each place of each block: int64 [batch, blocks * block], some before or behind the keys.

        A sequence's first token begins a block, wherever padding or a sliding window's cache has put it.
        """
        own = torch.arange(queries, device=step.position.device) + min(step.past, keys - queries)
        before = torch.where(step.valid, own - step.position, -keys)  # the key of a sequence's first token
        first = before.amax(1)
        first = torch.where(step.valid.any(1), first, 0)
        start = -((-first) % self.block)
        blocks = -(-(keys + self.block - 1) // self.block)
        return start[:, None] + torch.arange(blocks * self.block, device=start.device)

    def _gaps(self, query: Tensor, key: Tensor, attention_mask: Tensor, at: Tensor, **kwargs: Any) -> Tensor:
        """Gaps [batch, KV heads, tokens, blocks], float32 or wider."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scaling, cap = kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.get("softcap")
        keys = key.shape[2]
        there, at = (at >= 0) & (at < keys), at.clamp(0, keys - 1)
        key = key.to(wide).transpose(2, 3)
        gaps = []
        for rows in torch.arange(query.shape[2], device=key.device).split(CHUNK):
            part = query[:, :, rows].to(wide).unflatten(1, (key.shape[1], -1))
            scores = part @ key[:, :, None] * scaling  # [batch, KV heads, heads of the group, tokens, keys]
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            scores = scores.masked_fill(~attention_mask[:, :, None, rows], -torch.inf)
            scores = scores.gather(-1, at[:, None, None, None].expand(*scores.shape[:-1], -1))
            scores = scores.masked_fill(~there[:, None, None, None], -torch.inf)
            peaks = scores.unflatten(-1, (-1, self.block)).amax(-1)
            highest = peaks.cummax(-1).values
            gaps.append(torch.where(peaks == -torch.inf, peaks, peaks - highest).amax(2))
        return torch.cat(gaps, 2)
