"""TDA: neurons fixed from the prompt by a threshold on raw norms (First Activations Matter, arXiv 2408.11393)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.calibration import Calibration
from harness.families import View
from harness.method import Method, State
from harness.quantiles import Quantiles
from harness.selection import Mask
from harness.step import Step
from methods.prompt import PromptMasks

BISECTIONS = 60


@dataclass(frozen=True)
class Tda(Method):
    """Keeps, after a dense prompt, the neurons whose activation norm over the prompt exceeds their layer's threshold.

    The score of a neuron is the L2 norm of its column of act(gate) * up over the prompt's tokens, not normalised by
    token (GRIFFIN's is), divided by the square root of their number, so that a threshold serves prompts of any length.

    The abstract says "layer-wise threshold" and no more of it was found. Here all layers share one relative error: each
    threshold drops the same share of its layer's squared activations on calibration text, and that share is the one at
    which the requested sparsity is reached on average over layers. How much a layer drops differs by layer, and, since
    a threshold is no top-k, by prompt.
    """

    name: ClassVar[str] = "tda"
    paper: ClassVar[str] = "arXiv 2408.11393"
    needs: ClassVar[str] = "calibration"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    @property
    def sites(self) -> Mapping[str, str]:
        """Neurons, seen at the product before down."""
        return {} if self.sparsity == 0 else {"neurons": "output"}

    def fit(self, view: View, calibration: Calibration) -> State:
        """Quantiles of the scores float32 [layers, grid], every calibration window taken as a prompt."""
        quantiles = Quantiles(view.n_layers)

        def see(layer: int, x: Tensor) -> None:
            quantiles.see(layer, prompt_norms(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)))

        calibration.visit({"mlp_hidden": see})
        return {"quantiles": quantiles.grid()}

    def plan(self, view: View, state: State) -> Plan:
        """Thresholds by layer, and room for what the prompts will say."""
        levels = shared_error_levels(state["quantiles"], self.sparsity)
        cuts = [Quantiles.at(grid, level) for grid, level in zip(state["quantiles"], levels, strict=True)]
        return Plan(cuts, PromptMasks())

    def select(self, plan: Plan, site: str, layer: int, x: Tensor, step: Step) -> Mask | None:
        """The prompt's neurons for every token of its sequence. x: [batch, tokens, neurons]."""
        if step.past == 0:
            plan.masks.forget(layer)
        if bool(step.prompt.any()):
            plan.masks.fix(layer, prompt_norms(x, step.prompt) > plan.cuts[layer], step)
        return plan.masks.of(layer, len(x))


@dataclass(frozen=True, eq=False)
class Plan:
    """cuts: threshold of every layer. masks: what the current prompts fixed."""

    cuts: list[float]
    masks: PromptMasks


def prompt_norms(z: Tensor, prompt: Tensor) -> Tensor:
    """TDA's score float32 [batch, neurons] of z [batch, tokens, neurons] over prompt bool [batch, tokens]."""
    z = torch.where(prompt[..., None], z.float(), 0)
    return z.norm(dim=1) / prompt.sum(-1, keepdim=True).clamp(min=1).sqrt()


def shared_error_levels(grids: Tensor, sparsity: float) -> list[float]:
    """The share of neurons to drop in every layer, of mean `sparsity`, so that each loses the same share of energy.

    grids: quantiles [layers, grid] of the neurons' norms. The energy below a quantile is the sum of the squares there.
    """
    energy = grids.double().square().cumsum(-1)
    energy = energy / energy[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        levels = (energy <= middle).double().mean(-1)
        low, high = (middle, high) if levels.mean() <= sparsity else (low, middle)
    return levels.tolist()
