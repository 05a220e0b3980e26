"""The k largest of a row, in one launch: one block finds the threshold bit by bit, by counting what is not below it."""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.common import DTYPES, power_of_two

MOST = 1 << 15  # of a row: what one block holds in its registers
SHIFT = {torch.float32: 0, torch.float16: 0, torch.bfloat16: 16}  # bits of fp32 that say nothing


@triton.jit
def top_kernel(score_ptr, keep_ptr, n, k, SHIFT: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    live = at < n
    score_ptr += tl.program_id(0) * n
    keep_ptr += tl.program_id(0) * n
    x = tl.load(score_ptr + at, mask=live, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    keys = tl.where(bits == -2147483648, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))  # in the order of the floats
    keys = tl.where(x != x, 0x7FFFFFFF, keys) >> SHIFT
    first = tl.sum((live & (keys >= 0)).to(tl.int32), 0)
    cut = tl.where(first >= k, 0, -2147483648 >> SHIFT)
    for i in range(0, 31 - SHIFT):
        higher = cut + (1 << (30 - SHIFT - i))
        found = tl.sum((live & (keys >= higher)).to(tl.int32), 0)
        cut = tl.where(found >= k, higher, cut)
    above = live & (keys > cut)
    equal = live & (keys == cut)
    room = k - tl.sum(above.to(tl.int32), 0)
    keep = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
    tl.store(keep_ptr + at, keep.to(tl.uint8), mask=live)


def top_mask(score: Tensor, k: int) -> Tensor:
    """Where the k largest of each row of score [..., n] are, bool [..., n]; of equal ones the first, NaN above all.

    score: 16-bit or fp32, contiguous, n at most MOST; 1 <= k <= n.
    """
    n = score.shape[-1]
    keep = torch.empty(score.shape, dtype=torch.uint8, device=score.device)
    top_kernel[(score.numel() // n,)](
        score, keep, n, k, SHIFT=SHIFT[score.dtype], WIDTH=power_of_two(n), num_warps=4 if n <= 2048 else 8
    )
    return keep.view(torch.bool)


def top_fits(score: Tensor) -> bool:
    """Whether the kernel takes these scores."""
    return score.dtype in DTYPES and score.is_contiguous() and 0 < score.shape[-1] <= MOST
