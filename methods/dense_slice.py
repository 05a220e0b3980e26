"""Dense slice: the speed ceiling. An ideal smaller matmul over the first channels; its quality means nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.execution.method import Method, State
from harness.model.sees import Sees
from harness.model.selection import Mask, top_k_count
from harness.model.step import Step
from harness.model.view import View
from methods.topk import channels


@dataclass(frozen=True)
class DenseSlice(Method):
    """Keeps the first channels of every projection, whatever they hold: no deciding, no gathering."""

    name: ClassVar[str] = "dense_slice"
    paper: ClassVar[str] = "-"

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of all seven projections."""
        return channels(self.sparsity)

    def plan(self, view: View, state: State) -> dict[int, Mask]:
        """Keep masks by number of channels."""
        sizes = {view.channels(projection) for projection in view.projection_names()}
        return {n: Mask(torch.arange(n, device=view.device) < top_k_count(n, self.sparsity)) for n in sizes}

    def select(self, plan: dict[int, Mask], site: str, layer: int, x: Tensor, step: Step) -> Mask:
        """The same mask for every token. x: [batch, tokens, channels]."""
        return plan[x.shape[-1]]
