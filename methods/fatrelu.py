"""FATReLU: a ReLU with a positive threshold, the last step of ProSparse (arXiv 2402.13516, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from methods.swap import ActivationSwap


@dataclass(frozen=True)
class FatRelu(ActivationSwap):
    """gate where gate > threshold, else 0; times up."""

    name: ClassVar[str] = "fatrelu"
    paper: ClassVar[str] = "arXiv 2402.13516"
    activation: ClassVar[str] = "fatrelu"
