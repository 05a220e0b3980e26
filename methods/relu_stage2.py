"""ReLU, stage 2: ReLU after the norms too, so that q, k, v, gate and up have sparse inputs (2310.04564, section 4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from harness.model.sees import GATE, INPUT, Sees
from harness.model.view import View
from methods.swap import ActivationSwap


@dataclass(frozen=True)
class ReluStage2(ActivationSwap):
    """relu(gate) * up, and relu(norm(x)) before attention and MLP."""

    name: ClassVar[str] = "relu_stage2"
    paper: ClassVar[str] = "arXiv 2310.04564"
    activation: ClassVar[str] = "relu"

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons known from the gate, and the zeros after both norms."""
        return {"attn_in": INPUT, "mlp_in": INPUT, "neurons": GATE}

    def unsupported(self, view: View) -> str | None:
        """There must be norms before attention and MLP."""
        if "norms" in view.limits:
            return f"{self.name} can't run on {view.name}: {view.limits['norms']}"
        return super().unsupported(view)

    @contextmanager
    def _swapped(self, view: View, thresholds: list[float]) -> Iterator[None]:
        with super()._swapped(view, thresholds), ExitStack() as stack:
            for norm in (norm for pair in view.norms for norm in pair):
                handle = norm.register_forward_hook(lambda _m, _args, out: torch.relu(out))
                stack.callback(handle.remove)
            yield
