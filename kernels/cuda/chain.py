"""What lies between the projections of a chained decode step: the norm, and attention in one launch (csrc)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cuda import nvrtc
from kernels.cuda.common import cdiv

ONE_BLOCK = 1024  # entries of a cache up to which one block attends for a head: nothing is left to add up


class Scratch:
    """What the blocks of `attend` hand to one another; one serves all layers of a step."""

    def __init__(
        self, heads: int, width: int, capacity: int, device: torch.device, cut: tuple[int, int] | None = None
    ) -> None:
        """capacity: entries of the cache. cut: (warps of a block, blocks of a head)."""
        self.warps = 16 if capacity <= ONE_BLOCK else 4
        self.splits = 1 if capacity <= ONE_BLOCK else min(32, cdiv(capacity, self.warps * 8 * (256 // width)))
        self.warps, self.splits = cut or (self.warps, self.splits)
        self.parts = torch.empty(heads * self.splits * (width + 2), device=device)
        self.arrived = torch.zeros(heads, dtype=torch.int32, device=device)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    out: Tensor,
    scratch: Scratch,
    *,
    n_heads: int,
    scale: float,
    early: int = 0,
) -> Tensor:
    """As `attention.attend_step`, with q [H * D], k and v [G * D] apart; length: int64."""
    g, d = k_cache.shape[1], k_cache.shape[3]
    macros = {
        "BF16": k_cache.dtype == torch.bfloat16, "X32": q.dtype == torch.float32, "ACT": 0, "HAS_UP": 0,
        "PDL": min(1, early), "D": d, "SPLITS": scratch.splits, "WARPS": scratch.warps, "R": n_heads // g,
    }  # fmt: skip
    nvrtc.launch(
        nvrtc.kernel(out.device.index or 0, "attend", **macros), (n_heads, scratch.splits), 32 * scratch.warps,
        [
            q, k, v, cos, sin, k_cache, v_cache, length, scratch.parts, scratch.arrived, out,
            k_cache.stride(1), k_cache.stride(2), v_cache.stride(1), v_cache.stride(2), float(scale),
        ],
        early=early > 0,
    )  # fmt: skip
    return out


def norm(h: Tensor, weight: Tensor, eps: float, y: Tensor, *, early: int = 0) -> Tensor:
    """RMS norm of the residual stream h, fp32 [n], rounded before the weight; returns y [n]."""
    macros = {"BF16": y.dtype == torch.bfloat16, "X32": 1, "ACT": 0, "HAS_UP": 0, "PDL": min(1, early), "WARPS": 32}
    function = nvrtc.kernel(y.device.index or 0, "rms_norm", **macros)
    nvrtc.launch(function, (1, 1), 1024, [h, weight, y, h.numel(), float(eps)], early=early > 0)
    return y
