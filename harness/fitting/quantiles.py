"""Quantiles of |x| over a stream of activations, without keeping the activations."""

from __future__ import annotations

import torch
from torch import Tensor

GRID = 4001  # points of the quantile grid, evenly spaced in probability
_SHIFT = 15  # of a float32's 31 bits without sign keep 16: 8 exponent and 8 mantissa bits, bins 0.4 % wide
_BINS = 1 << 16


class Quantiles:
    """Streaming histogram of |x| for every layer, in bins that are equally wide on a logarithmic scale."""

    def __init__(self, n_layers: int) -> None:
        self.counts: list[Tensor | None] = [None] * n_layers

    def see(self, layer: int, x: Tensor) -> None:
        """Count x (any shape and float dtype)."""
        # In place, and counted as int32: copies of a large x cost more than the counting.
        bins = x.detach().abs().float().flatten().view(torch.int32).bitwise_right_shift_(_SHIFT)
        counts = torch.bincount(bins, minlength=_BINS)
        before = self.counts[layer]
        self.counts[layer] = counts if before is None else before + counts

    def grid(self) -> Tensor:
        """float32 [layers, GRID]: the value below which a share p of |x| lies, p = 0 ... 1 in even steps."""
        return torch.stack([_grid(counts) for counts in self.counts if counts is not None])

    @staticmethod
    def at(grid: Tensor, level: float) -> float:
        """The quantile `level` in [0, 1] of one layer's grid [GRID], between two points if need be."""
        place = level * (len(grid) - 1)
        below = min(int(place), len(grid) - 2)
        return torch.lerp(grid[below], grid[below + 1], place - below).item()


def _grid(counts: Tensor) -> Tensor:
    edges = (torch.arange(_BINS + 1, device=counts.device, dtype=torch.int64) << _SHIFT).clamp(max=0x7F7FFFFF)
    values = edges.int().view(torch.float32).double()
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).double()
    wanted = torch.linspace(0, 1, GRID, dtype=torch.float64, device=counts.device) * below[-1]
    bin_ = (torch.searchsorted(below, wanted) - 1).clamp(0, _BINS - 1)
    inside = ((wanted - below[bin_]) / (below[bin_ + 1] - below[bin_]).clamp(min=1)).clamp(0, 1)
    return (values[bin_] + inside * (values[bin_ + 1] - values[bin_])).float().cpu()
