"""ProSparse at inference: ReLU with the paper's shifted threshold (arXiv 2402.13516). Training is train=prosparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.swap import ActivationSwap


@dataclass(frozen=True)
class ProSparse(ActivationSwap):
    """gate where gate > threshold, else 0; times up, on a model trained under a progressive L1."""

    name: ClassVar[str] = "prosparse"
    paper: ClassVar[str] = "arXiv 2402.13516"
    activation: ClassVar[str] = "fatrelu"
