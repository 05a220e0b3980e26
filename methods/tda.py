"""TDA: neurons fixed from the prompt by a threshold on raw norms (First Activations Matter, arXiv 2408.11393)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import Quantiles
from harness.model.sees import PROMPT, Sees
from harness.model.selection import Mask
from harness.model.step import Step
from harness.model.view import View
from methods.prompt import PromptMasks


@dataclass(frozen=True)
class Tda(Method):
    """Keeps, after a dense prompt, the neurons whose activation norm over the prompt exceeds their layer's threshold.

    The score of a neuron is the L2 norm of its column of act(gate) * up over the prompt's tokens, not normalised by
    token (GRIFFIN's is), divided by the square root of their number, so that a threshold serves prompts of any length.

    The abstract says "layer-wise threshold" and no more of it was found. Here a layer's threshold is the quantile of
    its neurons' scores over many calibration prompts: the requested sparsity is met on average over prompts, and what a
    single prompt drops differs by prompt and by layer. An equal share of squared activations in every layer was tried
    and is worse: a layer with one huge neuron then loses all the others.
    """

    name: ClassVar[str] = "tda"
    paper: ClassVar[str] = "arXiv 2408.11393"
    needs: ClassVar[str] = "calibration"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    @property
    def names_neurons(self) -> bool:
        """The prompt fixes them."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons, seen at the product before down while there is a prompt."""
        return {} if self.sparsity == 0 else {"neurons": PROMPT}

    def fit(self, view: View, calibration: Calibration) -> State:
        """Quantiles of the scores float32 [layers, grid], every calibration window taken as a prompt."""
        quantiles = Quantiles(view.n_layers)

        def see(layer: int, x: Tensor) -> None:
            quantiles.see(layer, prompt_norms(x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)))

        calibration.visit({"mlp_hidden": see})
        return {"quantiles": quantiles.grid()}

    def plan(self, view: View, state: State) -> Plan:
        """Thresholds by layer, and room for what the prompts will say."""
        return Plan([Quantiles.at(grid, self.sparsity) for grid in state["quantiles"]], PromptMasks())

    def select(self, plan: Plan, site: str, layer: int, x: Tensor, step: Step) -> Mask | None:
        """The prompt's neurons for every token of its sequence. x: [batch, tokens, neurons]."""
        if step.past == 0:
            plan.masks.forget(layer)
        if step.has_prompt:
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
