"""Top-p, top-k and max-p on the vectors of the MLP (Universal Properties of Activation Sparsity, arXiv 2509.00454)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.sees import GATE, INPUT, Sees
from harness.model.selection import Mask, Selection
from harness.model.step import Step
from harness.model.view import View
from methods.topk import best

VECTORS: dict[str, dict[str, Sees]] = {
    "input": {"mlp_in": INPUT},
    "gate": {"neurons": GATE},
    "intermediate": {"mlp_hidden": INPUT},
    "all_inputs": {"mlp_in": INPUT, "mlp_hidden": INPUT},
}
POINT = {"mlp_in": "mlp_in", "neurons": "gate", "mlp_hidden": "mlp_hidden"}  # where calibration sees a site's vector
GRID = 513  # values of p whose sparsity is measured; in between it is interpolated
WINDOWS = 4  # of calibration text that they are measured on


@dataclass(frozen=True)
class MlpRule(Method):
    """What the three rules share: the vector they look at, and p from the requested sparsity.

    at: the MLP's input (columns of gate and up), the activated gate (rows of up, columns of down; gate stays dense),
        its intermediate vector act(gate) * up (columns of down), or all_inputs (input and intermediate).
    """

    at: Literal["input", "gate", "intermediate", "all_inputs"] = "all_inputs"

    paper: ClassVar[str] = "arXiv 2509.00454"

    def __post_init__(self) -> None:
        if self.at not in VECTORS:
            raise ConfigError(f"method.{self.name}.at must be one of {', '.join(VECTORS)}, not {self.at!r}")

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Where the chosen vectors are inputs or gates."""
        return {} if self.sparsity == 0 else VECTORS[self.at]


@dataclass(frozen=True)
class TopK(MlpRule):
    """Keeps the k entries of largest magnitude; k follows from the sparsity."""

    name: ClassVar[str] = "topk"

    def select(self, plan: State, site: str, layer: int, x: Tensor, step: Step) -> Selection:
        """x: the site's vector [batch, tokens, n]."""
        return best(x.abs(), self.sparsity)


@dataclass(frozen=True)
class Solved(MlpRule):
    """A rule whose sparsity is what comes out: p is set on calibration text, one for all layers of a site.

    A requested sparsity is met in the mean over layers and tokens; a layer or a token may keep far more than another,
    which is the point of these rules.
    """

    needs: ClassVar[str] = "calibration"
    fit_fields: ClassVar[tuple[str, ...]] = ("at",)

    def counts(self, x: Tensor, p: Tensor) -> Tensor:
        """How many entries of x [tokens, n] are kept at each p [grid], summed over tokens: float64 [grid]."""
        raise NotImplementedError

    def keep(self, x: Tensor, p: float) -> Tensor:
        """What is kept of x [..., n], bool of that shape."""
        raise NotImplementedError

    def grid(self) -> Tensor:
        """Values of p from 0 to 1, float64 [GRID], rising."""
        raise NotImplementedError

    def fit(self, view: View, calibration: Calibration) -> State:
        """By site the share that is dropped at each p of the grid, float32 [GRID]."""
        p = self.grid()
        sums = {site: torch.zeros(GRID, dtype=torch.float64) for site in VECTORS[self.at]}
        seen = dict.fromkeys(sums, 0)
        left = {(site, layer): WINDOWS for site in sums for layer in range(view.n_layers)}

        def see(layer: int, x: Tensor, site: str) -> None:
            x = x[: left[site, layer]]
            left[site, layer] -= len(x)
            if len(x):
                flat = x.flatten(0, 1).float()
                sums[site] += self.counts(flat, p.to(flat)).double().cpu()
                seen[site] += flat.numel()

        calibration.visit({POINT[s]: lambda layer, x, s=s: see(layer, x, s) for s in sums})
        return {site: (1 - sums[site] / seen[site]).float() for site in sums}

    def plan(self, view: View, state: State) -> dict[str, float]:
        """The p of each site."""
        return {site: crossing(self.grid(), state[site].double(), self.sparsity) for site in self.sites}

    def select(self, plan: dict[str, float], site: str, layer: int, x: Tensor, step: Step) -> Mask:
        """x: the site's vector [batch, tokens, n]."""
        return Mask(self.keep(x, plan[site]))


@dataclass(frozen=True)
class TopP(Solved):
    """Keeps the smallest set of entries that holds a share p of the sum of |v_i|^power.

    power: 1 is the paper's.
    """

    power: float = 1.0

    name: ClassVar[str] = "topp"
    fit_fields: ClassVar[tuple[str, ...]] = ("at", "power")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power <= 0:
            raise ConfigError(f"method.topp.power must be above 0, not {self.power}")

    def grid(self) -> Tensor:
        """Finer towards 1: many small entries hold little."""
        return 1 - torch.linspace(1, 0, GRID, dtype=torch.float64) ** 2

    def counts(self, x: Tensor, p: Tensor) -> Tensor:
        """Sorted once, every p reads the cumulated sums."""
        mass = x.abs().pow(self.power).sort(-1, descending=True).values.cumsum(-1)
        wanted = p[None] * mass[:, -1:]
        return (torch.searchsorted(mass, wanted.contiguous()) + 1).clamp(max=x.shape[-1]).sum(0)

    def keep(self, x: Tensor, p: float) -> Tensor:
        """An entry stays if those before it, by size, hold less than p."""
        mass, order = x.float().abs().pow(self.power).sort(-1, descending=True)
        total = mass.cumsum(-1)
        before = total - mass
        kept = before < p * total[..., -1:]
        return torch.zeros_like(kept).scatter_(-1, order, kept)


@dataclass(frozen=True)
class MaxP(Solved):
    """Keeps the entries of at least p times the largest magnitude."""

    name: ClassVar[str] = "maxp"

    def grid(self) -> Tensor:
        """Finer towards 0: the largest entry is far from the others."""
        return torch.linspace(0, 1, GRID, dtype=torch.float64) ** 3

    def counts(self, x: Tensor, p: Tensor) -> Tensor:
        """By one histogram of |v| / max|v| over the grid."""
        relative = x.abs() / x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        bins = torch.bucketize(relative.flatten(), p, right=True)  # how many p are at most this
        return torch.bincount(bins, minlength=GRID + 1).flip(0).cumsum(0).flip(0)[1:]

    def keep(self, x: Tensor, p: float) -> Tensor:
        """Against the token's own maximum."""
        size = x.float().abs()
        return size >= p * size.amax(-1, keepdim=True)


def crossing(p: Tensor, dropped: Tensor, wanted: float) -> float:
    """The p at which a share `wanted` is dropped, between two points of the grid if need be.

    p: rising [grid]. dropped: the share at each, monotonous.
    """
    if dropped[0] > dropped[-1]:
        p, dropped = p.flip(0), dropped.flip(0)
    after = int(torch.searchsorted(dropped, wanted).clamp(1, len(p) - 1))
    step = (dropped[after] - dropped[after - 1]).item()
    fraction = (wanted - dropped[after - 1].item()) / step if step > 0 else 1.0
    return torch.lerp(p[after - 1], p[after], min(max(fraction, 0.0), 1.0)).item()
