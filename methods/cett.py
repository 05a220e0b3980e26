"""CETT: drop the neurons whose output is small, within an error budget of the whole (ReLU^2 Wins, arXiv 2402.03804)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import Quantiles
from harness.model.sees import INPUT, Sees
from harness.model.selection import Thresholds
from harness.model.step import Step
from harness.model.view import View
from harness.progress import track

CANDIDATES = 32  # thresholds a layer whose CETT is measured; in between it is interpolated


@dataclass(frozen=True)
class Cett(Method):
    """Drops neuron i where |n_i| = |a_i| * ||W_down[:, i]||_2 <= t, one t a layer; also called threshold truncation.

    a_i is the input of down, so gate and up stay dense and columns of down are skipped.

    cett: None: t is the `sparsity` quantile of |n_i| in every layer. A number: t has that cumulative error of tail
        truncation (see `truncation_error`) in every layer; `sparsity` is then not used: it is what comes out.
    cett_tokens: calibration tokens on which the error is measured.
    """

    cett: float | None = None
    cett_tokens: int = 512

    name: ClassVar[str] = "cett"
    paper: ClassVar[str] = "arXiv 2402.03804"
    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        if self.cett is not None and not 0 < self.cett < 1:
            raise ConfigError(f"method.cett.cett is a share of the MLP's output: above 0 and below 1, not {self.cett}")
        if self.cett_tokens < 1:
            raise ConfigError(f"method.cett.cett_tokens must be at least 1, not {self.cett_tokens}")

    @property
    def has_level(self) -> bool:
        """Not with an error budget: the sparsity is then what comes out."""
        return self.cett is None

    @property
    def names_neurons(self) -> bool:
        """The norms of their columns of down are part of the thresholds."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of down."""
        return {} if self.sparsity == 0 and self.cett is None else {"mlp_hidden": INPUT}

    def fit_key(self) -> dict[str, Any]:
        """One fit serves every sparsity, and one (it takes longer) every CETT."""
        return super().fit_key() | ({} if self.cett is None else {"cett_tokens": self.cett_tokens})

    def fit(self, view: View, calibration: Calibration) -> State:
        """`quantiles` of |n_i| float32 [layers, grid]; for a CETT also `t`, `cett` float32 [layers, CANDIDATES + 1]."""
        quantiles = Quantiles(view.n_layers)
        norms = [column_norms(block.down.weight).to(view.device) for block in view.blocks]
        heads: list[list[Tensor]] = [[] for _ in view.blocks]

        def see(layer: int, x: Tensor) -> None:
            quantiles.see(layer, x.float() * norms[layer])
            missing = self.cett_tokens - sum(len(part) for part in heads[layer])
            if self.cett is not None and missing > 0:
                heads[layer].append(x.flatten(0, 1)[:missing].clone())

        calibration.visit({"mlp_hidden": see})
        state = {"quantiles": quantiles.grid()}
        if self.cett is None:
            return state
        candidates, errors = [], []
        for layer in track(range(view.n_layers), "measuring CETT"):
            grid = state["quantiles"][layer]
            zeros = (grid == 0).float().mean().item()  # a ReLU's zeros cost nothing: no candidates are spent on them
            levels = (zeros + (1 - zeros) * i / CANDIDATES for i in range(CANDIDATES + 1))
            t = torch.tensor([Quantiles.at(grid, level) for level in levels])
            hidden, weight = torch.cat(heads[layer]), view.blocks[layer].down.weight.to(view.device)
            candidates.append(t)
            errors.append(torch.stack([truncation_error(hidden, weight, one).mean() for one in t.tolist()]).cpu())
        return state | {"t": torch.stack(candidates), "cett": torch.stack(errors)}

    def plan(self, view: View, state: State) -> list[Thresholds]:
        """Thresholds t / ||W_down[:, i]|| on |a_i| for every layer, [neurons] in the model's dtype."""
        plan = []
        for layer, block in enumerate(view.blocks):
            if self.cett is None:
                t = Quantiles.at(state["quantiles"][layer], self.sparsity)
            else:
                t = threshold_at(state["t"][layer], state["cett"][layer], self.cett)
            norms = column_norms(block.down.weight).to(view.device).clamp(min=torch.finfo(torch.float32).tiny)
            plan.append(Thresholds((t / norms).to(view.dtype)))
        return plan

    def select(self, plan: list[Thresholds], site: str, layer: int, x: Tensor, step: Step) -> Thresholds:
        """Static thresholds. x: [batch, tokens, neurons]."""
        return plan[layer]


def column_norms(weight: Tensor) -> Tensor:
    """||W[:, i]||_2 float32 [neurons] of down [d_model, neurons]."""
    return weight.float().norm(dim=0)


def truncation_error(hidden: Tensor, weight: Tensor, t: float) -> Tensor:
    """CETT of every token, float32 [tokens]: || sum of the n_i with |n_i| <= t || / || sum of all n_i ||.

    It is the norm of the sum: dropped neurons that cancel cost nothing. A sum of norms would be larger.

    hidden: inputs of down [tokens, neurons]. weight: down's [d_model, neurons]; its bias belongs to no neuron.
    """
    hidden, weight = hidden.float(), weight.float()
    tail = torch.where(hidden.abs() * column_norms(weight) <= t, hidden, 0)
    whole = (hidden @ weight.T).norm(dim=-1)
    return (tail @ weight.T).norm(dim=-1) / whole.clamp(min=torch.finfo(torch.float32).tiny)


def threshold_at(t: Tensor, error: Tensor, wanted: float) -> float:
    """The threshold with the wanted error, by binary search on candidates t [n], rising, with their errors [n]."""
    error = error.cummax(0).values  # the error of a sum need not rise everywhere
    after = int(torch.searchsorted(error, wanted).clamp(1, len(t) - 1))
    step = (error[after] - error[after - 1]).item()
    fraction = (wanted - error[after - 1].item()) / step if step > 0 else 1.0
    return torch.lerp(t[after - 1], t[after], min(max(fraction, 0.0), 1.0)).item()
