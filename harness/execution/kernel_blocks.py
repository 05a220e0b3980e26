"""Kernel execution of attention that leaves out blocks of V: one token each of any number of sequences of one length.

Prompts, padding, full sliding windows and capped scores are for masked execution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import kernels
from harness.execution import masked_heads
from harness.execution.masked_blocks import Blocks, Decide
from harness.model.view import View


@contextmanager
def skipping(view: View, block: int, decide: Decide, log_scale: float) -> Iterator[KernelBlocks]:
    """As `masked_blocks.skipping`, through kernels.

    log_scale: a decode token that sees n entries leaves out blocks with a gap below min(0, log_scale - ln(n)), which is
    what `decide` must come to for it.
    """
    blocks = KernelBlocks(view, block, decide, log_scale)
    with masked_heads.installed(blocks):
        yield blocks


class KernelBlocks(Blocks):
    """What attends while kernels leave blocks out."""

    with_kernel = frozenset({"attention"})

    def __init__(self, view: View, block: int, decide: Decide, log_scale: float) -> None:
        super().__init__(view, block, decide)
        self.log_scale = log_scale
        self.called: set[str] = set()
        self.residual: dict[int, Tensor] = {}
        self.last_mask: tuple[Tensor | None, bool] = None, False  # an attention mask, and whether it hides nothing

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """As in masked execution, by the kernel where it can."""
        step = self.view.tracker.step
        assert step is not None
        alone = step.valid.shape[1] == 1 and step.sparse is None and step.past > 0 and kwargs.get("softcap") is None
        if not alone or not self._sees_all(attention_mask, step.past + 1):
            return super().attend(layer, query, key, value, attention_mask, **kwargs)
        self.called.add("attention")
        length = torch.tensor(step.past + 1, device=query.device)
        out = kernels.skip_softmax(query, key, value, length, self.log_scale, self.block, kwargs.get("scaling"))
        return out.transpose(1, 2)

    def _sees_all(self, mask: Tensor, entries: int) -> bool:
        if self.last_mask[0] is not mask:  # one mask serves many layers, and asking it waits for the device
            self.last_mask = mask, mask.shape[-1] >= entries and bool(mask[..., :entries].all())
        return self.last_mask[1]
