"""What drives activations to zero while training: a progressive L1 weight and a controlled threshold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def progressive_weight(progress: float, ends: Sequence[float], peaks: Sequence[float]) -> float:
    """ProSparse's L1 weight (2402.13516, section 3.2) at `progress` in [0, 1] of the run.

    The first stage holds peaks[0]; stage i climbs from peaks[i - 1] to peaks[i] along half a sine wave and
    ends at ends[i]; after the last stage its peak stays.
    """
    if not peaks:
        return 0.0
    if progress <= ends[0]:
        return peaks[0]
    for i in range(1, len(peaks)):
        if progress <= ends[i]:
            share = (progress - ends[i - 1]) / (ends[i] - ends[i - 1])
            return peaks[i - 1] + (peaks[i] - peaks[i - 1]) * 0.5 * (1 + math.sin(math.pi * (share - 0.5)))
    return peaks[-1]


def steer_threshold(threshold: Tensor, zeros: Tensor, target: float, rate: float) -> Tensor:
    """The next FATReLU threshold: up while the measured share of zeros is under `target`, never under 0.

    ProSparse sets its shift once, after training; moving it while training lets the model adapt to it.
    threshold, zeros: 0-d; the device is not synchronised.
    """
    return (threshold + rate * (target - zeros)).clamp_min(0.0)


def threshold_target(progress: float, target: float, ramp: float, freeze: float) -> float | None:
    """The share of zeros to steer to: climbs linearly until `ramp`, then holds; None from `freeze` on."""
    if target <= 0 or progress >= freeze:
        return None
    return target * min(1.0, progress / ramp)


def square_gains(magnitudes: Tensor, reference: Tensor, low: float = 0.02, high: float = 2.0) -> Tensor:
    """Least-squares gain per neuron that best maps a new hidden value onto the old one, clamped.

    magnitudes: sum of new * new; reference: sum of new * old; both [..., neurons].
    """
    return torch.where(magnitudes > 0, reference / magnitudes.clamp_min(1e-12), 1.0).clamp(low, high)
