"""Statistical top-k: a threshold from each token's own mean and deviation (Spark Transformer, arXiv 2506.06644)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.model.sees import GATE, Sees
from harness.model.selection import Thresholds
from harness.model.step import Step
from harness.model.view import View

ZEROS = Thresholds(0.0)  # drops exact zeros and nothing else


@dataclass(frozen=True)
class StatisticalTopK(Method):
    """Drops neurons whose gate pre-activation a lies at or below mean(a) + std(a) * Phi^-1(sparsity), by token.

    Neither sorted nor calibrated: exact for Gaussian a only. Mean and deviation (of the population) are over neurons:
    in a mixture of experts over those of all experts that the token is routed to.

    Where blocks have a statistical top-k of their own (the first of Gemma 3n) that one stays, at the share that they
    were trained with: neurons are dropped whose gates it has set to zero, and `sparsity` is for the other blocks.

    shift: True is the rule of Gemma 3n, act(relu(a - threshold)): what stays loses the threshold, which a model must be
        trained for. False drops and changes nothing else.
    """

    shift: bool = False

    name: ClassVar[str] = "statistical_topk"
    paper: ClassVar[str] = "arXiv 2506.06644"

    def __post_init__(self) -> None:
        if not isinstance(self.shift, bool):
            raise ConfigError(f"method.statistical_topk.shift must be true or false, not {self.shift!r}")

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons, whose gates are exactly zero where dropped."""
        return {} if self.sparsity == 0 else {"neurons": GATE}

    def select(self, plan: State, site: str, layer: int, x: Tensor, step: Step) -> Thresholds:
        """Exact zeros. x: [batch, tokens, neurons]."""
        return ZEROS

    def rewrite(self, view: View, state: State) -> AbstractContextManager[None]:
        """The activations behind the threshold, where the model has none of its own."""
        return nullcontext() if self.sparsity == 0 else self._swapped(view)

    @contextmanager
    def _swapped(self, view: View) -> Iterator[None]:
        modules = [
            block.act if block.own_topk else Thresholded(view, block.act, self.sparsity, self.shift)
            for block in view.blocks
        ]
        with view.activation_swapped(f"{view.activation} behind statistical top-k", modules):
            yield


class Thresholded(nn.Module):
    """An activation behind a statistical threshold. Dense tokens of the step pass as they are."""

    def __init__(self, view: View, act: nn.Module, sparsity: float, shift: bool) -> None:
        super().__init__()
        self.act, self.shift, self.quantile = act, shift, NormalDist().inv_cdf(sparsity)
        self.tracker: Any = view.tracker

    def forward(self, a: Tensor) -> Tensor:
        """a: gate pre-activations [..., neurons]."""
        cut = threshold(a, self.quantile)
        out = self.act(torch.relu(a - cut)) if self.shift else torch.where(a > cut, self.act(a), 0)
        step = self.tracker.step
        if step is None or step.sparse is None:
            return out
        sparse = step.sparse.reshape(*a.shape[:-1], 1)  # experts see the batch flat
        return torch.where(sparse.to(a.device), out, self.act(a))


def threshold(a: Tensor, quantile: float) -> Tensor:
    """mean(a) + std(a) * quantile over the last dimension of a [..., n], kept as 1, in the dtype of a."""
    wide = a.double() if a.dtype == torch.float64 else a.float()
    return (wide.mean(-1, keepdim=True) + wide.std(-1, correction=0, keepdim=True) * quantile).to(a.dtype)
