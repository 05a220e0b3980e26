"""Mean-gate correction: a product of the size of the residual stream stands in for the neurons that are dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.view import View


@dataclass(frozen=True)
class MeanGate(Method):
    """Splits act(g) * u into (act(g) - m) * u and m * u, m a neuron's mean gate, for the method nested inside.

    The second part is linear in the MLP's input, M x with M = W_down diag(m) W_up [d_model, d_model], and is always
    computed; the method inside drops by (and of) the first. Where it drops nothing and M is whole, this is the dense
    model. To be nested outside of another method: `method=[meangate,cats]`.

    rank: of M, from a truncated SVD; 0 keeps it whole. What M reads for each token is charged.
    """

    rank: int = 0

    name: ClassVar[str] = "meangate"
    paper: ClassVar[str] = "-"
    needs: ClassVar[str] = "calibration"
    wraps: ClassVar[bool] = True
    families: ClassVar[tuple[str, ...]] = ("llama",)

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ConfigError(f"method.meangate.rank must be a whole number of at least 0, not {self.rank!r}")

    @property
    def knows_inputs(self) -> bool:
        """M is of the MLP's inputs."""
        return True

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
        wide = torch.promote_types(view.dtype, torch.float32)
        means = [m.to(block.up.weight.device, wide) for m, block in zip(mean, view.blocks, strict=True)]
        modules = [Centred(block.act, m.to(view.dtype)) for block, m in zip(view.blocks, means, strict=True)]
        with ExitStack() as stack:
            for block, m in zip(view.blocks, means, strict=True):
                whole = (block.down.weight.to(wide) * m.to(view.dtype).to(wide)) @ block.up.weight.to(wide)
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

                def add(_m: nn.Module, _a: tuple, out: Tensor, seen: list = seen, weights: list = weights) -> Tensor:
                    x = seen.pop()
                    for weight in weights:
                        x = F.linear(x, weight)
                    return out + x

                stack.callback(block.down.register_forward_hook(add).remove)
            stack.enter_context(view.activation_swapped(f"{view.activation} less its mean", modules))
            yield


class Centred(nn.Module):
    """An activation less a constant [neurons]."""

    def __init__(self, act: nn.Module, mean: Tensor) -> None:
        super().__init__()
        self.act, self.mean = act, mean

    def forward(self, gate: Tensor) -> Tensor:
        """gate: [..., neurons]."""
        return self.act(gate) - self.mean
