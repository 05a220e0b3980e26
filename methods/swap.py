"""What the activation swaps share: another activation in the MLP, its exact zeros skipped, a threshold for more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import Quantiles
from harness.model.activations import ACTIVATIONS, GateActivation
from harness.model.sees import GATE, Sees
from harness.model.selection import Thresholds
from harness.model.step import Step
from harness.model.view import View

ZEROS = Thresholds(0.0)  # drops exact zeros and nothing else


@dataclass(frozen=True)
class ActivationSwap(Method):
    """Replaces the activation and skips the zeros that it makes.

    A zero of the activated gate is known before up is computed: up rows and down columns are skipped. At sparsity 0 the
    zeros are the natural ones; at a higher sparsity the threshold of the activation is raised, layer by layer, to the
    quantile of the gate that makes that share of zeros (a layer that has more keeps them). In a nest of methods the
    requested sparsity belongs to the innermost; swaps outside of it keep their natural zeros.

    threshold: least threshold of the activation (FATReLU).
    """

    threshold: float = 0.0

    activation: ClassVar[str]
    swap: ClassVar[bool] = True
    needs: ClassVar[str] = "calibration"
    fit_fields: ClassVar[tuple[str, ...]] = ("threshold",)

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons, known from the gate."""
        return {"neurons": GATE}

    def unsupported(self, view: View) -> str | None:
        """A plain MLP has no gate."""
        if not view.gated:
            return f"{self.name} changes the activation of the gate, and the MLP of {view.name} has none"
        return super().unsupported(view)

    def fit(self, view: View, calibration: Calibration) -> State:
        """gate: float32 [layers, grid], quantiles of the activated gate of the swapped model."""
        quantiles = Quantiles(view.n_layers)
        with self._swapped(view, [self.threshold] * view.n_layers):
            calibration.visit({"gate": quantiles.see})
        return {"gate": quantiles.grid()}

    def thresholds(self, state: State) -> list[float]:
        """The activation's threshold of every layer."""
        power = 0.5 if self.activation == "relu2" else 1.0  # the grid is of the activated gate, x squared
        wanted = [Quantiles.at(grid, self.sparsity) ** power for grid in state["gate"]]
        return [max(self.threshold, t if self.sparsity > 0 else 0.0) for t in wanted]

    def select(self, plan: State, site: str, layer: int, x: Tensor, step: Step) -> Thresholds:
        """Exact zeros. x: [batch, tokens, neurons]."""
        return ZEROS

    def rewrite(self, view: View, state: State) -> AbstractContextManager[None]:
        """The swapped activation, at the thresholds of this sparsity."""
        return self._swapped(view, self.thresholds(state))

    @contextmanager
    def _swapped(self, view: View, thresholds: list[float]) -> Iterator[None]:
        pairs = zip(view.blocks, thresholds, strict=True)
        modules = [GateActivation(self.activation, t).to(block.up.weight.device) for block, t in pairs]
        with ExitStack() as stack:
            stack.enter_context(view.activation_swapped(self.activation, modules))
            if ACTIVATIONS[self.activation].relu_on_up:
                for block in view.blocks:
                    handle = block.up.register_forward_hook(lambda _m, _args, up: torch.relu(up))
                    stack.callback(handle.remove)
            yield
