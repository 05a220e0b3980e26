"""Products of one row with weights in 4 or 8 bits that read the channels above a cut alone (kernels/few_bits.py).

Two launches for one weight or two of a shape: sums over slices of the channels, then what adds them up, in a fixed
order, and ends with scale, bias and, if asked for, |up * act(gate)|. Whatever the determinism setting says, results are
bitwise repeatable: what is chosen by them must not change from one run to the next. The partial sums are small beside
the codes. The cut is a number of the launch, so nothing is copied from the host and a CUDA graph can hold both.
"""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.common import DTYPES, act_code, activate, cdiv
from kernels.few_bits import ALIGN, Channels

PROGRAMS = 2048  # of one warp each, that a large GPU keeps busy with


@triton.jit
def add_codes(low, high, code_ptr, at, keep, x, BITS: tl.constexpr):
    """The sums `low` and `high` [BW] with the codes at `at` [BM, BW] times x [BM]; only where `keep` [BM] is read.

    4 bits: codes count from 0, so that 8 times the sum of x has still to be taken off. 8 bits: high stays.
    """
    code = tl.load(code_ptr + at, mask=keep[:, None], other=0, eviction_policy="evict_first")
    if BITS == 4:
        low += tl.sum((code & 15).to(tl.float32) * x[:, None], 0)
        high += tl.sum((code >> 4).to(tl.float32) * x[:, None], 0)
    else:
        low += tl.sum(code.to(tl.int8, bitcast=True).to(tl.float32) * x[:, None], 0)
    return low, high


@triton.jit
def store_sums(low, high, part_ptr, at, W, total, BITS: tl.constexpr):
    if BITS == 4:
        tl.store(part_ptr + at, low - 8.0 * total)
        tl.store(part_ptr + W + at, high - 8.0 * total)
    else:
        tl.store(part_ptr + at, low)


@triton.jit(do_not_specialize=["cut"])
def sums_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    part_ptr,
    cut,
    K,
    KS,
    W,
    HAS_GATE: tl.constexpr,
    BITS: tl.constexpr,
    BW: tl.constexpr,
    BM: tl.constexpr,
):
    """part[split, up or gate, output]: the sum over the split's channels, fp32, without scale. Codes are [K, W]."""
    strip = tl.program_id(0)
    split = tl.program_id(1)
    rw = strip * BW + tl.arange(0, BW)
    k0 = split * KS
    end = tl.minimum(k0 + KS, K)
    up_low = tl.zeros([BW], tl.float32)
    up_high = tl.zeros([BW], tl.float32)
    gate_low = tl.zeros([BW], tl.float32)
    gate_high = tl.zeros([BW], tl.float32)
    inputs = tl.zeros([BM], tl.float32)
    for k in range(k0, end, BM):
        rk = k + tl.arange(0, BM)
        x = tl.load(x_ptr + rk, mask=rk < end, other=0.0).to(tl.float32)
        x = tl.where(tl.abs(x) <= cut, 0.0, x)
        keep = x != 0.0  # as in column_kernels.py: NaN is kept, and a zero adds nothing whatever the cut is
        at = rk[:, None] * W + rw[None, :]
        up_low, up_high = add_codes(up_low, up_high, up_ptr, at, keep, x, BITS)
        if HAS_GATE:
            gate_low, gate_high = add_codes(gate_low, gate_high, gate_ptr, at, keep, x, BITS)
        inputs += x
    total = tl.sum(inputs, 0)
    outputs = W * (8 // BITS)
    part_ptr += split * outputs * (2 if HAS_GATE else 1)
    store_sums(up_low, up_high, part_ptr, rw, W, total, BITS)
    if HAS_GATE:
        store_sums(gate_low, gate_high, part_ptr + outputs, rw, W, total, BITS)


@triton.jit
def finished(
    part_ptr, scale_ptr, bias_ptr, at, live, S, step, HAS_BIAS: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr
):
    """Sum of part[:S, at], fp32 [BN], times the outputs' scale, with bias."""
    acc = tl.zeros([BN], tl.float32)
    for s in range(0, S, BS):
        rs = s + tl.arange(0, BS)
        part = tl.load(part_ptr + rs[:, None] * step + at[None, :], mask=(rs < S)[:, None] & live[None, :], other=0.0)
        acc += tl.sum(part, 0)
    acc = acc * tl.load(scale_ptr + at, mask=live, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + at, mask=live, other=0.0).to(tl.float32)
    return acc


@triton.jit
def end_kernel(
    part_ptr,
    gate_scale_ptr,
    up_scale_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    y_ptr,
    N,
    outputs,
    S,
    HAS_GATE: tl.constexpr,
    HAS_BG: tl.constexpr,
    HAS_BU: tl.constexpr,
    ACT: tl.constexpr,
    DT: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
):
    """y [N] = |up * act(gate)|, or with ACT 0 the products alone, y [1 or 2, N]: gate's before up's."""
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    live = at < N
    step = outputs * (2 if HAS_GATE else 1)
    up = finished(part_ptr, up_scale_ptr, up_bias_ptr, at, live, S, step, HAS_BU, BN, BS).to(DT)
    if HAS_GATE:
        part_ptr += outputs
        gate = finished(part_ptr, gate_scale_ptr, gate_bias_ptr, at, live, S, step, HAS_BG, BN, BS).to(DT)
        if ACT == 0:
            tl.store(y_ptr + at, gate, mask=live)
            tl.store(y_ptr + N + at, up, mask=live)
        else:
            a = activate(gate.to(tl.float32), ACT).to(DT).to(tl.float32)
            tl.store(y_ptr + at, tl.abs(a * up.to(tl.float32)).to(DT), mask=live)
    elif ACT == 0:
        tl.store(y_ptr + at, up, mask=live)
    else:
        tl.store(y_ptr + at, tl.abs(activate(up.to(tl.float32), ACT)).to(DT), mask=live)


def few_bits_product(
    x: Tensor,
    gate: Channels | None,
    up: Channels,
    cut: float,
    act: str | None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """`kernels.few_bits.magnitudes` as [1, ..., n]; without `act` the products, [2, ..., n] (gate, up) or [1, ..., n].

    tile: (channels of a load tile, channels of a program), for tuning.
    """
    k, width = up.codes.shape
    n, outputs = len(up.scale), width * 8 // up.bits
    strips = width // ALIGN
    channels, of_program = tile or _tile(k, strips)
    splits, both = cdiv(k, of_program), gate is not None
    flat = x.reshape(-1).contiguous()
    part = torch.empty(splits, 1 + both, outputs, dtype=torch.float32, device=x.device)
    y = x.new_empty(2 if both and act is None else 1, *x.shape[:-1], n)
    first = up if gate is None else gate
    sums_kernel[(strips, splits)](
        flat, first.codes, up.codes, part, cut, k, of_program, width,
        HAS_GATE=both, BITS=up.bits, BW=ALIGN, BM=channels, num_warps=1,
    )  # fmt: skip
    end_kernel[(cdiv(n, 64),)](
        part, first.scale, up.scale, flat if gate_bias is None else gate_bias, flat if up_bias is None else up_bias, y,
        n, outputs, splits,
        HAS_GATE=both, HAS_BG=gate_bias is not None, HAS_BU=up_bias is not None, ACT=act_code(act), DT=DTYPES[x.dtype],
        BN=64, BS=32, num_warps=4,
    )  # fmt: skip
    return y


def _tile(k: int, strips: int) -> tuple[int, int]:
    """(channels of a load tile, channels of a program): by arithmetic, no GPU was asked for the best."""
    splits = max(1, PROGRAMS // strips)
    return 32, cdiv(cdiv(k, splits), 32) * 32


def few_bits_fits(x: Tensor, *weights: Channels | None) -> bool:
    """Whether `few_bits_product` takes x [..., d] by these weights: one row in a dtype that it knows, where they lie."""
    given = [w for w in weights if w is not None]
    shapes = {(w.codes.shape, w.bits, len(w.scale)) for w in given}
    return (
        x.dtype in DTYPES
        and 0 < x.numel() == x.shape[-1]
        and len(shapes) == 1
        and all(w.codes.device == x.device and len(w.codes) == x.numel() and w.codes.numel() < 1 << 31 for w in given)
    )
