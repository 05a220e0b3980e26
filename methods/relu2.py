"""ReLU squared (ReLU² Wins, arXiv 2402.03804)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.swap import ActivationSwap


@dataclass(frozen=True)
class Relu2(ActivationSwap):
    """relu(gate)² * up. The threshold is on the gate, not on its square."""

    name: ClassVar[str] = "relu2"
    paper: ClassVar[str] = "arXiv 2402.03804"
    activation: ClassVar[str] = "relu2"
