"""Random: the floor. Drops input channels of every projection without looking at them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.execution.method import Method, State
from harness.model.sees import INPUT, Sees
from harness.model.selection import PROJECTIONS, Mask, top_k_count
from harness.model.step import Step
from harness.model.view import View

PERIOD = 64  # patterns per projection; a token's position picks one, so rows of a batch and reruns agree


@dataclass(frozen=True)
class Random(Method):
    """Keeps exactly the requested share of the channels, another random set for each position and projection."""

    seed: int = 0

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "-"

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of all seven projections."""
        return {} if self.sparsity == 0 else dict.fromkeys(PROJECTIONS, INPUT)

    def plan(self, view: View, state: State) -> dict[tuple[str, int], Tensor]:
        """Keep patterns bool [PERIOD, channels] by (projection, layer)."""
        generator = torch.Generator().manual_seed(self.seed)
        patterns = {}
        for layer in range(view.n_layers):
            for projection in view.projection_names():
                n = view.channels(projection)
                kept = torch.rand(PERIOD, n, generator=generator).argsort(-1)[:, : top_k_count(n, self.sparsity)]
                pattern = torch.zeros(PERIOD, n, dtype=torch.bool).scatter_(-1, kept, True)
                patterns[projection, layer] = pattern.to(view.device)
        return patterns

    def select(
        self, plan: dict[tuple[str, int], Tensor], site: str, layer: int, x: Tensor, step: Step
    ) -> dict[str, Mask]:
        """The pattern of each token's position. x: [batch, tokens, channels]."""
        row = step.position % PERIOD
        names = [p for p in PROJECTIONS[site] if (p, layer) in plan]
        return {p: Mask(plan[p, layer][row]) for p in names}
