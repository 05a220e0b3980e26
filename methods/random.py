"""Random: the floor. Drops input channels of every projection without looking at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.execution.method import Method, State
from harness.model.sees import Sees
from harness.model.selection import PROJECTIONS, Mask, keep_mask
from harness.model.step import Step
from harness.model.view import View
from methods.topk import best, channels, of_position, random_table


@dataclass(frozen=True)
class Random(Method):
    """Keeps exactly the requested share of the channels, another random set for each position and projection."""

    seed: int = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "-"

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of all seven projections."""
        return channels(self.sparsity)

    def plan(self, view: View, state: State) -> dict[tuple[str, int], Tensor]:
        """Keep patterns bool [PERIOD, channels] by (projection, layer)."""
        generator = torch.Generator().manual_seed(self.seed)
        patterns = {}
        for layer in range(view.n_layers):
            for projection in view.projection_names():
                scores = -random_table(view.channels(projection), generator)
                patterns[projection, layer] = keep_mask(best(scores, self.sparsity), scores).to(view.device)
        return patterns

    def select(
        self, plan: dict[tuple[str, int], Tensor], site: str, layer: int, x: Tensor, step: Step
    ) -> dict[str, Mask]:
        """The pattern of each token's position. x: [batch, tokens, channels]."""
        return {p: Mask(of_position(plan[p, layer], step)) for p in PROJECTIONS[site] if (p, layer) in plan}
