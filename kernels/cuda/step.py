"""Small fused pieces of a decode step around the products with weights."""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.column_kernels import channel_values
from kernels.cuda.common import DTYPES, act_code, cdiv, power_of_two


@triton.jit
def rms_norm_kernel(x_ptr, w_ptr, y_ptr, n, eps, WIDTH: tl.constexpr, DT: tl.constexpr):
    at = tl.arange(0, WIDTH)
    live = at < n
    x_ptr += tl.program_id(0) * n
    y_ptr += tl.program_id(0) * n
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=live, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / n + eps)
    tl.store(y_ptr + at, (x.to(DT).to(tl.float32) * w).to(y_ptr.dtype.element_ty), mask=live)


def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> Tensor:
    """RMS norm, x / rms(x) * weight, rounded before the weight as Llama's is, in one launch; returns y.

    x: [n] or [rows, n], contiguous, 16-bit or fp32; weight: [n]; y: as x.
    """
    n = x.shape[-1]
    rms_norm_kernel[(x.numel() // n,)](
        x, weight, y, n, eps, WIDTH=power_of_two(n), DT=DTYPES[weight.dtype], num_warps=16
    )
    return y


@triton.jit
def glu_kernel(gate_ptr, up_ptr, y_ptr, n, gate_row, up_row, ACT: tl.constexpr, DT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    row = tl.program_id(1)
    x = channel_values(gate_ptr + row * gate_row, up_ptr + row * up_row, at, live, ACT, True, DT)
    tl.store(y_ptr + row * n + at, x.to(y_ptr.dtype.element_ty), mask=live)


def glu_into(gate: Tensor, up: Tensor, act: str, y: Tensor) -> Tensor:
    """act(gate) * up in one launch, rounded as a module does; for dense steps through a library. Returns y.

    gate, up: [n] or [rows, n] with any stride between rows; y: as they are, contiguous.
    """
    n, rows = gate.shape[-1], gate.numel() // gate.shape[-1]
    strides = (gate.stride(0), up.stride(0)) if gate.dim() > 1 else (0, 0)
    glu_kernel[(cdiv(n, 512), rows)](
        gate, up, y, n, *strides, ACT=act_code(act), DT=DTYPES[y.dtype], BLOCK=512, num_warps=4
    )
    return y
