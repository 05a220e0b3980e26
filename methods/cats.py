"""CATS: contextually-aware thresholding of the gate (arXiv 2404.08763)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import Quantiles
from harness.model.sees import GATE, Sees
from harness.model.selection import Thresholds
from harness.model.step import Step
from harness.model.view import View


@dataclass(frozen=True)
class Cats(Method):
    """Drops neuron i where |act(gate)_i| <= t, the layer's `sparsity` quantile on calibration text.

    The gate stays dense: it is what the decision is made from. Rows of up and columns of down are skipped.
    """

    name: ClassVar[str] = "cats"
    paper: ClassVar[str] = "arXiv 2404.08763"
    needs: ClassVar[str] = "calibration"

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons, seen at the activated gate."""
        return {} if self.sparsity == 0 else {"neurons": GATE}

    def fit(self, view: View, calibration: Calibration) -> State:
        """Quantiles of |act(gate)| float32 [layers, grid]."""
        quantiles = Quantiles(view.n_layers)
        calibration.visit({"gate": quantiles.see})
        return {"quantiles": quantiles.grid()}

    def plan(self, view: View, state: State) -> list[Thresholds]:
        """One threshold a layer, as the model's dtype would hold it."""
        levels = [Quantiles.at(grid, self.sparsity) for grid in state["quantiles"]]
        return [Thresholds(torch.tensor(t).to(view.dtype).item()) for t in levels]

    def select(self, plan: list[Thresholds], site: str, layer: int, x: Tensor, step: Step) -> Thresholds:
        """Static thresholds. x: the activated gate [batch, tokens, neurons]."""
        return plan[layer]
