"""ReLU: stage 1 of ReLU Strikes Back, the gate's SiLU replaced (arXiv 2310.04564, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.swap import ActivationSwap


@dataclass(frozen=True)
class Relu(ActivationSwap):
    """relu(gate) * up. Without training it ruins a SwiGLU model; see the trained checkpoints."""

    name: ClassVar[str] = "relu"
    paper: ClassVar[str] = "arXiv 2310.04564"
    activation: ClassVar[str] = "relu"
