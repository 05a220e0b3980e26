"""GRIFFIN: neurons fixed from the prompt for the whole answer (arXiv 2404.01365)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.execution.method import Method, State
from harness.model.sees import PROMPT, Sees
from harness.model.selection import Mask, keep_mask
from harness.model.step import Step
from harness.model.view import View
from methods.prompt import PromptMasks
from methods.topk import best


@dataclass(frozen=True)
class Griffin(Method):
    """Keeps, after a dense prompt, the neurons of largest flocking statistic (section 4), the same for all tokens.

    With Z = act(gate) * up over the prompt's tokens, every row is scaled to unit length, so that no token dominates;
    the statistic of a neuron is the L2 norm of its column.
    """

    name: ClassVar[str] = "griffin"
    paper: ClassVar[str] = "arXiv 2404.01365"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    @property
    def names_neurons(self) -> bool:
        """The prompt fixes them."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons, seen at the product before down while there is a prompt."""
        return {} if self.sparsity == 0 else {"neurons": PROMPT}

    def plan(self, view: View, state: State) -> PromptMasks:
        """Room for what the prompts will say."""
        return PromptMasks()

    def select(self, plan: PromptMasks, site: str, layer: int, x: Tensor, step: Step) -> Mask | None:
        """The prompt's neurons for every token of its sequence. x: [batch, tokens, neurons]."""
        if step.past == 0:
            plan.forget(layer)
        if step.has_prompt:
            score = flocking(x, step.prompt)
            plan.fix(layer, keep_mask(best(score, self.sparsity), score), step)
        return plan.of(layer, len(x))


def flocking(z: Tensor, prompt: Tensor) -> Tensor:
    """GRIFFIN's statistic float32 [batch, neurons] of z [batch, tokens, neurons] over prompt bool [batch, tokens]."""
    z = torch.where(prompt[..., None], z.float(), 0)
    return (z / z.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)).norm(dim=1)
