"""The activations of a gated MLP, `down(act(gate) * up)`, as plain functions and as modules to swap in.

Sources: ReLU (ReLU Strikes Back, 2310.04564), ReLU^2 (ReLU^2 Wins, 2402.03804), dReLU (TurboSparse, 2406.05955),
FATReLU, that is a ReLU with a positive threshold (ProSparse, 2402.13516). A threshold of 0 is the plain ReLU,
so each of them takes one. Every function is element-wise, keeps shape and dtype, and lets NaN through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

Threshold = float | Tensor


def silu(x: Tensor, threshold: Threshold = 0.0) -> Tensor:
    """X * sigmoid(x): the activation of the original model. It has no zeros, so the threshold is ignored."""
    return functional.silu(x)


def fatrelu(x: Tensor, threshold: Threshold = 0.0) -> Tensor:
    """X where x > threshold, else exactly 0. Threshold 0 is ReLU."""
    return torch.where(x <= threshold, torch.zeros_like(x), x)


def relu2(x: Tensor, threshold: Threshold = 0.0) -> Tensor:
    """X squared where x > threshold, else exactly 0. The threshold is on x, not on its square."""
    kept = fatrelu(x, threshold)
    return kept * kept


@dataclass(frozen=True)
class GatedActivation:
    """What happens to the two halves of a gated MLP: hidden = gate(g, threshold) * up(u)."""

    gate: Callable[[Tensor, Threshold], Tensor]
    relu_on_up: bool = False

    def hidden(self, gate: Tensor, up: Tensor, threshold: Threshold = 0.0) -> Tensor:
        """The MLP's hidden vector. gate, up: [..., neurons]; same shape and dtype out."""
        return self.gate(gate, threshold) * self.up(up)

    def up(self, up: Tensor) -> Tensor:
        """The up half: ReLU for dReLU, else unchanged."""
        return torch.relu(up) if self.relu_on_up else up


# dReLU = relu(gate) * relu(up): its zeros are known from either half.
ACTIVATIONS: dict[str, GatedActivation] = {
    "silu": GatedActivation(silu),
    "relu": GatedActivation(fatrelu),
    "fatrelu": GatedActivation(fatrelu),
    "relu2": GatedActivation(relu2),
    "drelu": GatedActivation(fatrelu, relu_on_up=True),
}


class GateActivation(nn.Module):
    """The gate half of `ACTIVATIONS[name]` as a module to put in the place of an MLP's `act_fn`."""

    threshold: Tensor

    def __init__(self, name: str, threshold: Threshold = 0.0) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[name]
        self.name = name
        self.register_buffer("threshold", torch.as_tensor(threshold, dtype=torch.float32), persistent=False)

    def forward(self, gate: Tensor) -> Tensor:
        """The activation of `gate`, any shape."""
        # a 0-d fp32 tensor does not promote a bf16 operand
        return self.activation.gate(gate, self.threshold)

    def extra_repr(self) -> str:
        """Name and threshold, for printing the model."""
        return f"{self.name}, threshold={float(self.threshold):.4g}"
