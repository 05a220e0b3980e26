"""Oracle: the quality ceiling of input-channel selection. True top-k by contribution, known before the matmul."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from harness.families import View
from harness.method import Method, State
from harness.selection import PROJECTIONS, TopK, top_k_count
from harness.step import Step


@dataclass(frozen=True)
class Oracle(Method):
    """Keeps, for each token and projection, the channels i of largest |x_i| * ||W[:, i]||_2."""

    name: ClassVar[str] = "oracle"
    paper: ClassVar[str] = "-"
    oracle: ClassVar[bool] = True

    @property
    def sites(self) -> Mapping[str, str]:
        """Input channels of all seven projections."""
        return {} if self.sparsity == 0 else dict.fromkeys(PROJECTIONS, "input")

    def plan(self, view: View, state: State) -> dict[tuple[str, int], Tensor]:
        """Column norms [channels] by (projection, layer)."""
        return {
            (name, layer): module.weight.float().norm(dim=0)
            for layer, block in enumerate(view.blocks)
            for name, module in block.projections()
        }

    def select(
        self, plan: dict[tuple[str, int], Tensor], site: str, layer: int, x: Tensor, step: Step
    ) -> dict[str, TopK]:
        """Top-k of the contributions. x: [batch, tokens, channels]."""
        size = x.float().abs()
        k = top_k_count(x.shape[-1], self.sparsity)
        return {p: TopK(size * plan[p, layer], k) for p in PROJECTIONS[site] if (p, layer) in plan}
