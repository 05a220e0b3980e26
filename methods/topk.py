"""What methods share that score candidates and keep the best of each token: the arithmetic, and the random floor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.execution.method import Method
from harness.model.sees import INPUT, Sees
from harness.model.selection import PROJECTIONS, SiteSelection, TopK, top_k_count
from harness.model.step import Step

PERIOD = 64  # rows of a random table; a token's position picks one, so rows of a batch and reruns agree


@dataclass(frozen=True)
class Scored(Method):
    """Keeps, for each token and wherever it acts, the share 1 - sparsity of largest score."""

    def score(self, plan: Any, site: str, layer: int, x: Tensor, step: Step) -> Tensor | Mapping[str, Tensor]:
        """Scores [batch, tokens, n] from what `select` sees, or one such tensor for each projection at the site."""
        raise NotImplementedError(f"{type(self).__name__} keeps the best and scores nothing")

    def select(self, plan: Any, site: str, layer: int, x: Tensor, step: Step) -> SiteSelection:
        """The best by `score`. x: what the site sees, [batch, tokens, channels]."""
        scores = self.score(plan, site, layer, x, step)
        if isinstance(scores, Tensor):
            return best(scores, self.sparsity)
        return {projection: best(own, self.sparsity) for projection, own in scores.items()}


def best(scores: Tensor, sparsity: float) -> TopK:
    """All but the lowest share `sparsity` of scores [..., n]."""
    return TopK(scores, top_k_count(scores.shape[-1], sparsity))


def channels(sparsity: float) -> dict[str, Sees]:
    """The sites of a method that skips input channels of all seven projections, and what it sees there."""
    return {} if sparsity == 0 else dict.fromkeys(PROJECTIONS, INPUT)


def random_table(n: int, generator: torch.Generator) -> Tensor:
    """Random scores float32 [PERIOD, n] for `of_position`."""
    return torch.rand(PERIOD, n, generator=generator)


def of_position(table: Tensor, step: Step) -> Tensor:
    """The row of each token, [batch, tokens, n], of a table [PERIOD, n]."""
    return table[step.position % PERIOD]
