"""Small fused pieces of a decode step around the GEMVs, batch 1."""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.column import channel_values
from kernels.cuda.common import DTYPES, act_code, cdiv, power_of_two


@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, n, eps, WIDTH: tl.constexpr, DT: tl.constexpr):
    at = tl.arange(0, WIDTH)
    live = at < n
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=live, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / n + eps)
    tl.store(y_ptr + at, (x.to(DT).to(tl.float32) * w).to(y_ptr.dtype.element_ty), mask=live)


def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> Tensor:
    """RMS norm, x / rms(x) * weight, rounded before the weight as Llama's is, in one launch of one program; returns y.

    x: [n], 16-bit or fp32; weight, y: [n].
    """
    n = x.numel()
    rms_norm_kernel[(1,)](x, weight, y, n, eps, WIDTH=power_of_two(n), DT=DTYPES[weight.dtype], num_warps=16)
    return y


@triton.jit
def glu_kernel(gate_ptr, up_ptr, y_ptr, n, ACT: tl.constexpr, DT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    x = channel_values(gate_ptr, up_ptr, at, live, ACT, True, DT)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=live)


def glu_into(gate: Tensor, up: Tensor, act: str, y: Tensor) -> Tensor:
    """act(gate) * up [n] in one launch, rounded as a module does; for dense steps through a library. Returns y."""
    n = gate.numel()
    glu_kernel[(cdiv(n, 512),)](gate, up, y, n, ACT=act_code(act), DT=DTYPES[y.dtype], BLOCK=512, num_warps=4)
    return y
