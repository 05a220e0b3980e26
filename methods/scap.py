"""SCAP: inputs of the MLP's projections, moved so that most lie near zero, behind thresholds (arXiv 2412.07174)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.changes import Moved, changed
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import Quantiles
from harness.model.sees import INPUT, Sees
from harness.model.selection import PROJECTIONS, Thresholds
from harness.model.step import Step
from harness.model.view import View
from methods.larosa import tilted
from methods.spon import biased
from methods.teal import threshold

SITES = ("mlp_in", "mlp_hidden")
SAMPLE = 16384  # values of a layer and batch of text that a centre is found from
DENSEST = 0.1  # the mode is where this share of the values lies closest together


@dataclass(frozen=True)
class Scap(Method):
    """Drops |x_i - c| <= t at the inputs of gate, up and down: W x = W (x - c) + W c, the last a bias (section 3).

    c is one number a layer and site, t a quantile of |x - c| on calibration text.

    centre: mode (the middle of the shortest interval that holds a tenth of the values: where a density has its peak),
        median, or zero, which leaves c out. The paper's own settings are zero for Llama-2 and Mistral, whose inputs
        have their mode there anyway, the peak for MPT and the median for Falcon.
    tilt: inputs of gate and up are cut by 1 - tilt, those of down by 1 + tilt times a common level, which makes the
        whole come to `sparsity` of the MLP's weights. 0.2 is the paper's 40 % and 60 % (Mistral-7B; Llama-2-7B has 35
        and 55).
    """

    centre: Literal["mode", "median", "zero"] = "mode"
    tilt: float = 0.2

    name: ClassVar[str] = "scap"
    paper: ClassVar[str] = "arXiv 2412.07174"
    needs: ClassVar[str] = "calibration"
    fit_fields: ClassVar[tuple[str, ...]] = ("centre",)

    def __post_init__(self) -> None:
        if self.centre not in ("mode", "median", "zero"):
            raise ConfigError(f"method.scap.centre must be mode, median or zero, not {self.centre!r}")
        if not -1 < self.tilt < 1:
            raise ConfigError(f"method.scap.tilt must lie between -1 and 1, not {self.tilt}")

    @property
    def names_neurons(self) -> bool:
        """It reads the weights that the centre meets."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of gate and up, and of down."""
        return {} if self.sparsity == 0 else dict.fromkeys(SITES, INPUT)

    def fit(self, view: View, calibration: Calibration) -> State:
        """By site S: S.centre float32 [layers], and S float32 [layers, grid], quantiles of |x - centre|."""
        centres = {site: torch.zeros(view.n_layers) for site in SITES}
        if self.centre != "zero":
            values = sampled(view, calibration)
            find = mode if self.centre == "mode" else torch.median
            centres = {site: torch.stack([find(layer) for layer in layers]) for site, layers in values.items()}
        quantiles = {site: Quantiles(view.n_layers) for site in SITES}

        def see(layer: int, x: Tensor, site: str) -> None:
            quantiles[site].see(layer, x.float() - centres[site][layer].item())

        calibration.visit({site: lambda layer, x, site=site: see(layer, x, site) for site in SITES})
        grids = {site: q.grid() for site, q in quantiles.items()}
        return grids | {f"{site}.centre": centre for site, centre in centres.items()}

    def plan(self, view: View, state: State) -> dict[tuple[str, int], Thresholds]:
        """Thresholds by (site, layer), as the model's dtype would hold them."""
        names = view.projection_names()
        weights = {site: sum(view.weights(p) for p in PROJECTIONS[site] if p in names) for site in SITES}
        levels = tilted(weights, self.sparsity, self.tilt)
        return {
            (site, layer): threshold(grid, levels[site], view.dtype)
            for site in SITES
            for layer, grid in enumerate(state[site])
        }

    def select(
        self, plan: dict[tuple[str, int], Thresholds], site: str, layer: int, x: Tensor, step: Step
    ) -> Thresholds:
        """Static thresholds. x: [batch, tokens, channels], less its centre."""
        return plan[site, layer]

    def rewrite(self, view: View, state: State) -> AbstractContextManager[None]:
        """Inputs less their centre, and what the weights make of it as a bias."""
        return nullcontext() if self.sparsity == 0 else self._centred(view, state)

    @contextmanager
    def _centred(self, view: View, state: State) -> Iterator[None]:
        constants: dict[tuple[str, int], Tensor] = {}
        with ExitStack() as stack:
            for site in SITES:
                for layer, centre in enumerate(state[f"{site}.centre"].to(view.dtype).tolist()):
                    modules = dict(view.blocks[layer].projections())
                    for name in (p for p in PROJECTIONS[site] if p in modules and centre != 0):
                        weight = modules[name].weight.data
                        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
                        constants[name, layer] = (wide.sum(-1) * centre).to(view.dtype)
                        stack.enter_context(changed(modules[name], Moved(centre)))
            stack.enter_context(biased(view, constants))
            yield


def sampled(view: View, calibration: Calibration) -> dict[str, list[Tensor]]:
    """By site and layer float32 [n] on the CPU: inputs drawn from calibration text, SAMPLE of them from each batch."""
    found: dict[str, list[list[Tensor]]] = {site: [[] for _ in view.blocks] for site in SITES}
    generator = torch.Generator().manual_seed(0)

    def see(layer: int, x: Tensor, site: str) -> None:
        drawn = torch.randint(x.numel(), (SAMPLE,), generator=generator)
        found[site][layer].append(x.flatten()[drawn.to(x.device)].float().cpu())

    calibration.visit({site: lambda layer, x, site=site: see(layer, x, site) for site in SITES})
    return {site: [torch.cat(parts) for parts in layers] for site, layers in found.items()}


def mode(values: Tensor) -> Tensor:
    """The middle of the shortest interval that holds a share DENSEST of values [n], 0-d."""
    ordered = values.sort().values
    held = max(2, round(DENSEST * len(ordered)))
    first = (ordered[held - 1 :] - ordered[: len(ordered) - held + 1]).argmin()
    return (ordered[first] + ordered[first + held - 1]) / 2
