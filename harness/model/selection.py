"""Selections: what a method decides at a site for each token. A small closed set, so that kernels can run every one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

Site = Literal["attn_in", "heads", "kv", "attn_out", "mlp_in", "neurons", "mlp_hidden"]
Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]

# Input channels of which projections a channel site is about.
PROJECTIONS: dict[str, tuple[str, ...]] = {
    "attn_in": ("q", "k", "v"),
    "attn_out": ("o",),
    "mlp_in": ("gate", "up"),
    "mlp_hidden": ("down",),
}


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Keep channel i where |x_i| > t_i. t: a float, or a Tensor [channels] in the dtype of x."""

    t: float | Tensor


@dataclass(frozen=True, eq=False)
class Mask:
    """Keep where True. keep: bool, broadcastable to [batch, tokens, channels | neurons | heads]."""

    keep: Tensor


@dataclass(frozen=True, eq=False)
class TopK:
    """Keep, for each token, the k entries of largest score. score: [batch, tokens, n]; 0 <= k <= n."""

    score: Tensor
    k: int


Selection = Thresholds | Mask | TopK
# One selection for the site, or one for each projection at it; None keeps everything.
SiteSelection = Selection | Mapping[str, Selection] | None


def placed(selection: SiteSelection, device: torch.device) -> SiteSelection:
    """The selection with its tensors on a device; itself where they are there."""
    if isinstance(selection, Mapping):
        return {name: _placed(own, device) for name, own in selection.items()}
    return None if selection is None else _placed(selection, device)


def _placed(selection: Selection, device: torch.device) -> Selection:
    if isinstance(selection, Thresholds):
        return Thresholds(selection.t.to(device)) if isinstance(selection.t, Tensor) else selection
    if isinstance(selection, Mask):
        return Mask(selection.keep.to(device))
    return TopK(selection.score.to(device), selection.k)


def keep_mask(selection: Selection, x: Tensor) -> Tensor:
    """The selection as a bool mask broadcastable to x [..., n] (True = kept)."""
    if isinstance(selection, Thresholds):
        # "not <=" rather than ">": NaN is kept, so that a broken activation shows as it does in dense.
        return ~(x.abs() <= selection.t)
    if isinstance(selection, Mask):
        return selection.keep
    k = selection.k
    n = selection.score.shape[-1]
    if k >= n:
        return torch.ones_like(selection.score, dtype=torch.bool)
    if selection.score.numel() == n:  # one token: a kernel's business
        return kernels.top_mask(selection.score, k)
    kept = selection.score.topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(selection.score, dtype=torch.bool).scatter_(-1, kept, True)


def apply(selection: Selection, x: Tensor, sparse: Tensor | None) -> Tensor:
    """Zero what the selection drops: masked execution, the definition.

    x: [batch, tokens, n]. sparse: bool [batch, tokens], tokens that the selection applies to (None = all of them).
    """
    if isinstance(selection, Thresholds) and isinstance(selection.t, float):
        dropped = F.hardshrink(x, selection.t) if selection.t >= 0 else x  # one pass; keeps |x| > t exactly
    else:
        dropped = torch.where(keep_mask(selection, x), x, 0)
    return dropped if sparse is None else torch.where(sparse[..., None], dropped, x)


def top_k_count(n: int, sparsity: float) -> int:
    """How many of n stay at the requested sparsity (rounded to the nearest, at least one)."""
    return max(1, round(n * (1.0 - sparsity)))
