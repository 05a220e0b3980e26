"""Mean-gate correction: a product of the size of the residual stream stands in for the neurons that are dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import ConfigError, UnsupportedError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.activations import ACTIVATIONS
from harness.model.view import View


@dataclass(frozen=True)
class MeanGate(Method):
    """Splits act(g) * u into (act(g) - m) * u and m * u, m a neuron's mean gate, for the method nested inside.

    The second part is linear in the MLP's input, M x + W_down (m * b) with M = W_down diag(m) W_up [d_model, d_model]
    and b the bias of up, where it has one, and is always computed; the method inside drops by (and of) the first. Where
    it drops nothing and M is whole, this is the dense model: of any gated MLP whose up half is linear. To be nested
    outside of another method: `method=[meangate,cats]`.

    rank: of M, from a truncated SVD; 0 keeps it whole. What M reads for each token is charged.
    """

    rank: int = 0

    name: ClassVar[str] = "meangate"
    paper: ClassVar[str] = "-"
    needs: ClassVar[str] = "calibration"
    wraps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ConfigError(f"method.meangate.rank must be a whole number of at least 0, not {self.rank!r}")

    @property
    def names_neurons(self) -> bool:
        """Each has a mean of its own."""
        return True

    @property
    def knows_inputs(self) -> bool:
        """M is of the MLP's inputs."""
        return True

    def unsupported(self, view: View) -> str | None:
        """There must be a gate, and an up half that is linear."""
        if not view.gated:
            return f"{self.name} takes the mean of the gate, and the MLP of {view.name} has none"
        return bent(view) or super().unsupported(view)

    def fit(self, view: View, calibration: Calibration) -> State:
        """`mean` float32 [layers, neurons]: the mean of the activated gate over calibration tokens."""
        sums = [torch.zeros(view.d_ff, dtype=torch.float64, device=view.device) for _ in view.blocks]

        def see(layer: int, x: Tensor) -> None:
            sums[layer] += x.flatten(0, 1).double().sum(0)

        calibration.visit({"gate": see})
        return {"mean": torch.stack(sums).div(calibration.tokens).float().cpu()}

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """M, or its two factors."""
        if self.sparsity == 0:
            return {}
        whole = view.d_model**2
        return {"mlp": view.n_layers * (min(whole, 2 * self.rank * view.d_model) if self.rank else whole)}

    def rewrite(self, view: View, state: State) -> AbstractContextManager[None]:
        """Gates less their means, and M x added behind down."""
        return nullcontext() if self.sparsity == 0 else self._split(view, state["mean"])

    @contextmanager
    def _split(self, view: View, mean: Tensor) -> Iterator[None]:
        if sentence := bent(view):  # by a method outside
            raise UnsupportedError(sentence)
        wide = torch.promote_types(view.dtype, torch.float32)
        means = [m.to(block.up.weight.device, wide) for m, block in zip(mean, view.blocks, strict=True)]
        modules = [Centred(block.act, m.to(view.dtype)) for block, m in zip(view.blocks, means, strict=True)]
        with ExitStack() as stack:
            for layer, (block, m) in enumerate(zip(view.blocks, means, strict=True)):
                gated = block.down.weight.to(wide) * m.to(view.dtype).to(wide)
                whole = gated @ block.up.weight.to(wide)
                # What others fold into it stands for inputs that they drop or move: M sees them as they are.
                bias = view.own_biases.get(("up", layer), block.up.bias)
                constant = None if bias is None else (gated @ bias.to(wide)).to(view.dtype)
                parts = [whole]
                if self.rank:
                    u, s, v = torch.linalg.svd(whole, full_matrices=False)
                    parts = [v[: self.rank], u[:, : self.rank] * s[: self.rank]]
                weights, seen = [part.to(view.dtype) for part in parts], list[Tensor]()
                # First of all hooks: what others drop of x, or move it by, is no business of M's.
                before = block.up.register_forward_pre_hook(
                    lambda _m, args, seen=seen: seen.append(args[0]), prepend=True
                )
                stack.callback(before.remove)

                stack.callback(block.down.register_forward_hook(partial(_add, seen, weights, constant)).remove)
            stack.enter_context(view.activation_swapped(f"{view.activation} less its mean", modules))
            yield


def _add(
    seen: list[Tensor], weights: list[Tensor], constant: Tensor | None, _m: nn.Module, _args: tuple, out: Tensor
) -> Tensor:
    """A forward hook of down: what it gives, and the product of the input that up has seen with all weights in turn."""
    x = seen.pop()
    for weight in weights[:-1]:
        x = F.linear(x, weight)
    return out + F.linear(x, weights[-1], constant)


def bent(view: View) -> str | None:
    """One sentence why m * u is not linear in the MLP's input, or None."""
    activation = ACTIVATIONS.get(view.activation)
    if activation is None or not activation.relu_on_up:
        return None
    return f"meangate needs an up half that is linear, and that of {view.name} goes through a ReLU ({view.activation})"


class Centred(nn.Module):
    """An activation less a constant [neurons]."""

    def __init__(self, act: nn.Module, mean: Tensor) -> None:
        super().__init__()
        self.act, self.mean = act, mean

    def forward(self, gate: Tensor) -> Tensor:
        """gate: [..., neurons]."""
        return self.act(gate) - self.mean
