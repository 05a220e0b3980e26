"""Scratch memory that kernels leave as they found it: all zeros.

A split-K kernel adds partial sums into an fp32 accumulator that must start at zero. The kernel that rounds the finished
sums writes the zeros back, so no launch only clears. One accumulator for each (device, stream) serves every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

_pools: dict[tuple[torch.device, int], Tensor] = {}
_outgrown: list[Tensor] = []  # captured graphs may still point at these


def accumulator(device: torch.device, n: int) -> Tensor:
    """fp32 [>= n], zero; the kernels that use it must leave it zero."""
    if device.type != "cuda":  # the interpreter
        return torch.zeros(n, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    pool = _pools.get(key)
    if pool is not None and pool.numel() >= n:
        return pool
    if torch.cuda.is_current_stream_capturing():
        # Not warmed up on this stream: right all the same, at the price of a memset node in the graph.
        return torch.zeros(n, device=device)
    if pool is not None:
        _outgrown.append(pool)
    _pools[key] = torch.zeros(max(n, 1 << 17), device=device)
    return _pools[key]
