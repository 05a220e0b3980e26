"""CHESS: a threshold of its own for every channel of the gate, and for the inputs of q and o (arXiv 2409.01366)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import Quantiles
from harness.model.sees import GATE, INPUT, Sees
from harness.model.selection import SiteSelection, Thresholds
from harness.model.step import Step
from harness.model.view import View
from methods.norms import TINY
from methods.teal import threshold

ATTENTION = ("attn_in", "attn_out")


@dataclass(frozen=True)
class Chess(Method):
    """Drops neuron i where |act(gate)_i| * E|up_i| <= t, which is a threshold t / E|up_i| on its gate (section 3.2).

    The mean of |up_i| over calibration text stands in for the value that is not computed yet; t is the layer's quantile
    of the products. In attention the inputs of q and of o lie behind one threshold each; k and v stay dense, for what
    they write stays in the cache (section 3.3).

    attention: whether the inputs of q and o are cut, to the same sparsity; False is the paper's CHESS w/o.
    """

    attention: bool = True

    name: ClassVar[str] = "chess"
    paper: ClassVar[str] = "arXiv 2409.01366"
    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        if not isinstance(self.attention, bool):
            raise ConfigError(f"method.chess.attention must be true or false, not {self.attention!r}")

    @property
    def names_neurons(self) -> bool:
        """It learns of every single one."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons, seen at the activated gate, and the inputs of q and o."""
        if self.sparsity == 0:
            return {}
        return {"neurons": GATE} | (dict.fromkeys(ATTENTION, INPUT) if self.attention else {})

    def skips(self, view: View) -> frozenset[str]:
        """Of what reads attention's input q alone."""
        return super().skips(view) - {"k", "v"}

    def fit(self, view: View, calibration: Calibration) -> State:
        """`up` float32 [layers, neurons], means of |up|; quantiles float32 [layers, grid] by site.

        At neurons of |act(gate)| * up, at attn_in and attn_out of |x|.
        """
        up = mean_up(view, calibration).to(view.device)
        quantiles = {site: Quantiles(view.n_layers) for site in ("neurons", *ATTENTION)}
        see: dict[str, Any] = {site: quantiles[site].see for site in ATTENTION}
        see["gate"] = lambda layer, x: quantiles["neurons"].see(layer, x.float().abs() * up[layer])
        calibration.visit(see)
        return {site: q.grid() for site, q in quantiles.items()} | {"up": up.cpu()}

    def plan(self, view: View, state: State) -> dict[tuple[str, int], SiteSelection]:
        """By (site, layer) thresholds in the model's dtype: [neurons] on gates, one number on attention's inputs."""
        plan: dict[tuple[str, int], SiteSelection] = {}
        for layer, up in enumerate(state["up"].to(view.device)):
            t = Quantiles.at(state["neurons"][layer], self.sparsity)
            plan["neurons", layer] = Thresholds((t / up.clamp(min=TINY)).to(view.dtype))
            for site in ATTENTION:
                own = threshold(state[site][layer], self.sparsity, view.dtype)
                plan[site, layer] = {"q": own} if site == "attn_in" else own
        return plan

    def select(
        self, plan: dict[tuple[str, int], SiteSelection], site: str, layer: int, x: Tensor, step: Step
    ) -> SiteSelection:
        """Static thresholds. x: the activated gate, or attention's inputs, [batch, tokens, n]."""
        return plan[site, layer]


def mean_up(view: View, calibration: Calibration) -> Tensor:
    """E|up_i| over calibration text, float32 [layers, neurons] on the CPU."""
    sums = [torch.zeros(view.d_ff, dtype=torch.float64, device=view.device) for _ in view.blocks]

    def adder(total: Tensor):  # noqa: ANN202 (a torch hook)
        def hook(_m: nn.Module, _a: tuple, out: Tensor) -> None:
            total.add_(out.abs().flatten(0, -2).sum(0, dtype=torch.float64).to(total.device))

        return hook

    with ExitStack() as stack:
        for block, total in zip(view.blocks, sums, strict=True):
            stack.callback(block.up.register_forward_hook(adder(total)).remove)
        calibration.visit({})
    return torch.stack(sums).div(calibration.tokens).float().cpu()
