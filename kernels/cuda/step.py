"""Small fused pieces of a decode step around the GEMVs, batch 1."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.common import DTYPES, power_of_two


@triton.jit
def rms_norm_kernel(
    x_ptr, w_ptr, y_ptr, zero_ptr, n, n_zero, eps, WIDTH: tl.constexpr, DT: tl.constexpr, HAS_ZERO: tl.constexpr
):
    at = tl.arange(0, WIDTH)
    live = at < n
    if HAS_ZERO:
        for z in range(0, n_zero, WIDTH):
            tl.store(zero_ptr + z + at, tl.zeros([WIDTH], tl.float32), mask=z + at < n_zero)
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=live, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / n + eps)
    tl.store(y_ptr + at, (x.to(DT).to(tl.float32) * w).to(y_ptr.dtype.element_ty), mask=live)


def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor, zero: Tensor | None = None) -> Tensor:
    """y = x / rms(x) * weight, rounded before the weight as Llama's norm does; one program, one launch; returns y.

    x: [n], 16-bit or fp32; weight, y: [n]. zero: fp32 accumulator of the next kernel, cleared on the way, which
    saves that kernel a launch.
    """
    n = x.numel()
    rms_norm_kernel[(1,)](
        x, weight, y, y if zero is None else zero, n, 0 if zero is None else zero.numel(), eps,
        WIDTH=power_of_two(n), DT=DTYPES[weight.dtype], HAS_ZERO=zero is not None, num_warps=16,
    )  # fmt: skip
    return y
