"""Static removal of the experts that are used least (Unraveling Babel, arXiv 2402.16367), and how often each is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.sees import INPUT, Sees
from harness.model.selection import Mask, TopK, keep_mask, top_k_count
from harness.model.step import Step
from harness.model.view import View
from methods import experts
from methods.moefication import split_layers


@dataclass(frozen=True)
class ExpertPrune(Method):
    """Drops the same experts for every token: those that calibration tokens use least.

    order: frequency, or random (the baseline).
    rates: uniform (the same share in every layer) or layerwise (the least used of all layers together, so that a layer
        in which a few experts do the work loses more; every layer keeps one).
    """

    order: Literal["frequency", "random"] = "frequency"
    rates: Literal["uniform", "layerwise"] = "uniform"
    expert_size: int = 32
    seed: int = 0

    name: ClassVar[str] = "expert_prune"
    paper: ClassVar[str] = "arXiv 2402.16367"
    needs: ClassVar[str] = "calibration"
    fit_fields: ClassVar[tuple[str, ...]] = ("expert_size", "seed")

    def __post_init__(self) -> None:
        for key, known in (("order", ("frequency", "random")), ("rates", ("uniform", "layerwise"))):
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"method.expert_prune.{key} must be one of {', '.join(known)}, not {getattr(self, key)!r}"
                )
        if not isinstance(self.expert_size, int) or self.expert_size < 1:
            raise ConfigError(
                f"method.expert_prune.expert_size must be a whole number of at least 1, not {self.expert_size!r}"
            )

    @property
    def names_neurons(self) -> bool:
        """Experts are made of them."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons, known before anything is computed."""
        return {} if self.sparsity == 0 else {"neurons": INPUT}

    def unsupported(self, view: View) -> str | None:
        """Experts must divide the neurons."""
        return experts.does_not_divide(view, self.expert_size) or super().unsupported(view)

    def fit(self, view: View, calibration: Calibration) -> State:
        """`expert_of` int64 [layers, neurons] and `frequency` float32 [layers, experts] on the calibration text."""
        splits = torch.stack(split_layers(view, calibration, "kmeans", self.expert_size, self.seed))
        return {"expert_of": splits, "frequency": experts.frequencies(view, splits, calibration.batches)}

    def usage(self, view: View, state: State, batches: Iterable[Tensor]) -> Tensor:
        """The frequencies that it prunes by, on other text."""
        return experts.frequencies(view, state["expert_of"], batches)

    def plan(self, view: View, state: State) -> list[Mask]:
        """One keep mask bool [neurons] a layer."""
        worth = state["frequency"]
        if self.order == "random":
            worth = torch.rand(worth.shape, generator=torch.Generator().manual_seed(self.seed))
        kept = kept_experts(worth, self.sparsity, self.rates)
        return [Mask(k[e].to(view.device)) for k, e in zip(kept, state["expert_of"], strict=True)]

    def select(self, plan: list[Mask], site: str, layer: int, x: Tensor, step: Step) -> Mask:
        """The same for every token. x: [batch, tokens, d_model]."""
        return plan[layer]


def kept_experts(worth: Tensor, sparsity: float, rates: str) -> Tensor:
    """Bool [layers, experts]: those of most worth [layers, experts], by layer (uniform) or over all (layerwise).

    A layer always keeps its best one.
    """
    if rates == "uniform":
        return keep_mask(TopK(worth, top_k_count(worth.shape[1], sparsity)), worth)
    order = worth.argsort(dim=1, descending=True, stable=True)
    best = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, order[:, :1], True)
    ranked = torch.where(best, torch.inf, worth).flatten()
    kept = max(len(worth), top_k_count(worth.numel(), sparsity))
    return keep_mask(TopK(ranked, kept), ranked).view_as(worth)
