"""The byte roofline's denominator: how fast this GPU reads."""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCKS = (2048, 4096, 8192, 16384)


@triton.jit
def read_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0, eviction_policy="evict_first")
    if tl.sum(x, 0) == -123456789:  # never on these data, but the compiler can't know: the loads must stay
        tl.store(out_ptr, 1)


def read(x: torch.Tensor, out: torch.Tensor, block: int) -> None:
    """Read every element of x (int32) once; a program reads `block` of them."""
    read_kernel[(-(-x.numel() // block),)](x, out, x.numel(), BLOCK=block, num_warps=8)


def read_bandwidth(device: torch.device | str = "cuda", seconds: float = 0.3, n_bytes: int | None = None) -> float:
    """Bytes/s of a streaming read of a buffer far larger than the L2 cache.

    The median over as many passes as fit in `seconds`, for the fastest of a few block sizes: a denominator that is too
    small would flatter every share. n_bytes: size of the buffer (default 4 GB, at most a quarter of the free memory).
    """
    device = torch.device(device)
    free, _ = torch.cuda.mem_get_info(device)
    n_bytes = n_bytes or min(4 << 30, free // 4)
    with torch.cuda.device(device):
        x = torch.ones(n_bytes // 4, dtype=torch.int32, device=device)
        out = torch.zeros(1, dtype=torch.int32, device=device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        best = 0.0
        for block in BLOCKS:
            rates: list[float] = []
            spent = 0.0
            read(x, out, block)
            while spent < seconds / len(BLOCKS) or len(rates) < 9:
                start.record()
                read(x, out, block)
                end.record()
                end.synchronize()
                took = start.elapsed_time(end) / 1e3
                spent += took
                rates.append(x.nbytes / took)
            best = max(best, sorted(rates)[len(rates) // 2])
    return best
