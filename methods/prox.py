"""Prox: a low-bit copy of gate and up guesses which neurons matter; these run exactly (arXiv 2607.27591)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.inputs import Inputs
from harness.fitting.quantiles import Quantiles
from harness.model.few_bits import Copy, FewBits
from harness.model.sees import INPUT, Sees
from harness.model.selection import Mask, TopK
from harness.model.step import Step
from harness.model.view import View
from methods.topk import best

WEIGHT_BITS = 16  # what a copy's bits are charged against, also where the model happens to run in float32


@dataclass(frozen=True)
class Prox(Method):
    """Keeps neuron i where |u_i * act(g_i)|, by a low-bit copy of up and gate, exceeds the layer's threshold.

    bits: of the copy, symmetric with a scale a row; 16 and more: the weights themselves.
    input_sparsity: share of the inputs that the copy does not read, by a threshold on their magnitude.

    The copy decides and nothing else: what it computed never enters the model. Its bytes are charged as overhead. One
    token reads it as 4 or 8 bits (on a CPU with a scale, always one, for 32 of them) from the inputs above the cut, on
    a GPU where Triton is; many tokens, and copies of other widths, read it in 16 bits.
    """

    bits: int = 4
    input_sparsity: float = 0.5

    name: ClassVar[str] = "prox"
    paper: ClassVar[str] = "arXiv 2607.27591"
    needs: ClassVar[str] = "calibration"
    fit_fields: ClassVar[tuple[str, ...]] = ("bits", "input_sparsity")

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= WEIGHT_BITS:
            raise ConfigError(f"method.prox.bits must be a whole number from 2 to {WEIGHT_BITS}, not {self.bits!r}")
        if not 0 <= self.input_sparsity < 1:
            raise ConfigError(f"method.prox.input_sparsity is a share: from 0 to below 1, not {self.input_sparsity}")

    @property
    def names_neurons(self) -> bool:
        """It copies their weights."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons, decided from the MLP's input."""
        return {} if self.sparsity == 0 else {"neurons": INPUT}

    def fit(self, view: View, calibration: Calibration) -> State:
        """`cut` float32 [layers], on |x|, and `scores` float32 [layers, grid], quantiles of what the copy gives."""
        inputs = Inputs(calibration)
        if self.input_sparsity:
            calibration.visit({"mlp_in": inputs.see})
        return self.learnt(inputs)[0]

    def learnt(self, inputs: Inputs) -> tuple[State, list[Copy]]:
        """What `fit` gives, from inputs that are seen unless all of them are read; and the copies that gave it."""
        view = inputs.calibration.view
        cut = torch.full((view.n_layers,), -1.0)
        if self.input_sparsity:
            cut = torch.tensor([Quantiles.at(grid, self.input_sparsity) for grid in inputs.quantiles.grid()])
        scores, copies = Quantiles(view.n_layers), self.copies(view, cut)
        inputs.again(lambda layer, x: scores.see(layer, copies[layer].score(x)))
        return {"cut": cut, "scores": scores.grid()}, copies

    def plan(self, view: View, state: State) -> list[tuple[Copy, float]]:
        """For every layer the copy, and the threshold on its scores."""
        levels = [Quantiles.at(grid, self.sparsity) for grid in state["scores"]]
        return list(zip(self.copies(view, state["cut"]), levels, strict=True))

    def copies(self, view: View, cut: Tensor) -> list[Copy]:
        """By layer. cut: float32 [layers], on |x|; in the copies rounded as inputs are, or one token would compare with
        another number than a batch does.
        """
        cut = cut.to(view.dtype)
        return [
            Copy(
                None if block.gate is None else copied(block.gate.weight.to(view.device), self.bits),
                copied(block.up.weight.to(view.device), self.bits),
                block.act,
                cut[layer].item(),
                None if block.gate is None else block.gate.bias,
                block.up.bias,
            )
            for layer, block in enumerate(view.blocks)
        ]

    def score(self, plan: list[tuple[Copy, float]], site: str, layer: int, x: Tensor, step: Step) -> Tensor:
        """What the copy gives for the neurons [batch, tokens, neurons]. x: the MLP's input [batch, tokens, d_model]."""
        return plan[layer][0].score(x)

    def select(self, plan: list[tuple[Copy, float]], site: str, layer: int, x: Tensor, step: Step) -> Mask:
        """Above the layer's threshold. x: [batch, tokens, d_model]."""
        return Mask(~(self.score(plan, site, layer, x, step) <= plan[layer][1]))

    def guesses(self, view: View, plan: list[tuple[Copy, float]]) -> Mapping[int, tuple[Copy, Tensor]]:
        """All that is decided: the copy and the threshold, of every layer."""
        return {layer: (copy, torch.as_tensor(level, dtype=view.dtype)) for layer, (copy, level) in enumerate(plan)}

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """The share of the copy that is read, and its scales, in weights of 16 bits."""
        names = [p for p in ("gate", "up") if p in view.projection_names()]
        codes = sum(view.weights(p) for p in names) * (1 - self.input_sparsity) * self.bits / WEIGHT_BITS
        return {"mlp": round(view.n_layers * (codes + len(names) * view.d_ff))}


def copied(weight: Tensor, bits: int) -> FewBits:
    """The weight [n, d] in `bits` bits; from 16 on itself."""
    return FewBits.exact(weight) if bits >= WEIGHT_BITS else FewBits.of(weight, bits)


@dataclass(frozen=True)
class Dip(Method):
    """Dynamic input pruning (arXiv 2412.01380): top inputs of gate and up, then top products for down, by token.

    It decides from what is there anyway, so nothing is guessed: Prox without the copy.
    """

    name: ClassVar[str] = "dip"
    paper: ClassVar[str] = "arXiv 2412.01380"

    @property
    def sites(self) -> Mapping[str, Sees]:
        """The inputs of the MLP and of down."""
        return {} if self.sparsity == 0 else {"mlp_in": INPUT, "mlp_hidden": INPUT}

    def select(self, plan: State, site: str, layer: int, x: Tensor, step: Step) -> TopK:
        """The largest. x: [batch, tokens, channels]."""
        return best(x.abs(), self.sparsity)
