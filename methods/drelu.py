"""dReLU: ReLU on both halves of the gated MLP (TurboSparse, arXiv 2406.05955, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from harness.model.sees import GATE, INPUT, Sees
from methods.swap import ActivationSwap


@dataclass(frozen=True)
class DRelu(ActivationSwap):
    """relu(gate) * relu(up). Zeros of the gate skip up and down; zeros of the product skip down alone."""

    name: ClassVar[str] = "drelu"
    paper: ClassVar[str] = "arXiv 2406.05955"
    activation: ClassVar[str] = "drelu"

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons known from the gate, and columns of down where the product is zero."""
        return {"neurons": GATE, "mlp_hidden": INPUT}
