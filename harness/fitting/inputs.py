"""Inputs of the MLPs, for fits that look at them a second time: seldom worth a second pass over the text."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import Quantiles

HELD = 4 << 30  # bytes of inputs that are kept at most: what a training pass may need at once on any device


class Inputs:
    """What the MLPs are given on calibration text: its quantiles, and where there is room the inputs themselves."""

    def __init__(self, calibration: Calibration) -> None:
        view = calibration.view
        self.calibration, self.quantiles = calibration, Quantiles(view.n_layers)
        size = calibration.tokens * view.d_model * view.n_layers * view.dtype.itemsize
        self._keeps = size <= HELD
        self._kept: list[tuple[int, Tensor]] = []

    def see(self, layer: int, x: Tensor) -> None:
        """Count x [batch, length, d_model], and keep it if there is room."""
        self.quantiles.see(layer, x)
        if self._keeps:
            # One window at a time on a CPU: temporaries of several are beyond its caches, and of fresh pages each.
            self._kept += [(layer, part.clone()) for part in (x.split(1) if x.is_cpu else [x])]

    def again(self, see: Callable[[int, Tensor], None]) -> None:
        """Give `see` all inputs, in batches or windows, and let go of them; by another pass where none is kept."""
        if not self._kept:
            self.calibration.visit({"mlp_in": see})
        while self._kept:
            see(*self._kept.pop(0))
