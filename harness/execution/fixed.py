"""Decisions that are the same whatever is seen, told from a method's answers: kernels can make them by themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.model.selection import Selection, Thresholds, TopK


@dataclass(frozen=True)
class Largest:
    """The k channels of largest |x|, or |x| * worth (fp32 [channels])."""

    k: int
    worth: Tensor | None


def probes_of(channels: int) -> tuple[Tensor, ...]:
    """Inputs [1, 1, channels] so unlike that what is decided by each token's own answers them differently."""
    signs = torch.ones(channels).index_fill(0, torch.arange(0, channels, 2), -1.0)
    wide = torch.logspace(-3, 3, channels) * signs
    return tuple(x.view(1, 1, -1) for x in (torch.zeros(channels), torch.ones(channels), wide.flip(0)))


def as_threshold(own: list[Selection | None]) -> Thresholds | None:
    """The threshold that was answered to all probes, or None."""
    first = own[0]
    if isinstance(first, Thresholds) and all(isinstance(o, Thresholds) and _same(o.t, first.t) for o in own):
        return first
    return None


def as_largest(own: list[Selection | None], probes: list[Tensor]) -> Largest | None:
    """What the answers to `probes_of` come to if each is the k largest by |x|, or by |x| times the same; or None."""
    counted = [selection for selection in own if isinstance(selection, TopK)]
    k, sizes = (counted[0].k if counted else 0), [x.float().abs() for x in probes]
    if len(counted) < len(own) or any(o.k != k or o.score.shape != sizes[0].shape for o in counted):
        return None
    if not 0 < k < sizes[0].numel():
        return None
    scores = [selection.score.float() for selection in counted]
    if all(map(torch.equal, scores, sizes)):
        return Largest(k, None)
    worth = scores[1]  # of ones
    if all(selection.score.dtype == torch.float32 for selection in counted):
        if all(torch.equal(score, size * worth) for score, size in zip(scores, sizes, strict=True)):
            return Largest(k, worth.flatten())
    return None


def _same(a: Tensor | float, b: Tensor | float) -> bool:
    return a is b or torch.equal(torch.as_tensor(a), torch.as_tensor(b))
