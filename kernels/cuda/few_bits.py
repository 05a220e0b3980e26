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
from kernels.few_bits import WORDS, Channels

PROGRAMS = 2048  # of one warp each, that a large GPU keeps busy with


@triton.jit
def plus(acc, word, x, J: tl.constexpr, BITS: tl.constexpr):
    """Acc + x * (1 + c / 2^BITS), where c is code J of the words: moved to the upper mantissa of a float from 1 to 2.

    That is three instructions a code, where converting an integer takes twice as many.
    """
    FROM: tl.constexpr = J * BITS
    TO: tl.constexpr = 23 - BITS
    if TO >= FROM:
        word = word << (TO - FROM)
    else:
        word = word >> (FROM - TO)
    value = ((word & ((1 << 23) - (1 << TO))) | 0x3F800000).to(tl.float32, bitcast=True)
    return acc + value * x


@triton.jit
def add_codes(sums, word_ptr, at, keep, x, BITS: tl.constexpr):
    """The 32 / BITS sums [BM, BW], one for each code of a word, with the words at `at` times x [BM].

    Only where `keep` [BM] is read. Rows are added up when all is read: for each tile, that would cost as much as codes.
    """
    word = tl.load(word_ptr + at, mask=keep[:, None], other=0, eviction_policy="evict_first")
    x = x[:, None]
    s0 = plus(sums[0], word, x, 0, BITS)
    s1 = plus(sums[1], word, x, 1, BITS)
    s2 = plus(sums[2], word, x, 2, BITS)
    s3 = plus(sums[3], word, x, 3, BITS)
    if BITS == 8:
        return s0, s1, s2, s3
    else:
        s4 = plus(sums[4], word, x, 4, BITS)
        s5 = plus(sums[5], word, x, 5, BITS)
        s6 = plus(sums[6], word, x, 6, BITS)
        s7 = plus(sums[7], word, x, 7, BITS)
        return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def no_sums(BITS: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr):
    z = tl.zeros([BM, BW], tl.float32)
    if BITS == 8:
        return z, z, z, z
    else:
        return z, z, z, z, z, z, z, z


@triton.jit
def store_sums(sums, part_ptr, at, W, total, BITS: tl.constexpr):
    """Codes have 2^(BITS - 1) as their zero, and every one had a 1 of x added: both times the sum of x come off."""
    for j in tl.static_range(32 // BITS):
        found = tl.sum(sums[j], 0) * (1 << BITS) - 1.5 * (1 << BITS) * total
        tl.store(part_ptr + j * W + at, found)


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
    UNROLL: tl.constexpr,
):
    """part[split, up or gate, output]: the sum over the split's channels, fp32, without scale. Words are [K, W]."""
    strip = tl.program_id(0)
    split = tl.program_id(1)
    rw = strip * BW + tl.arange(0, BW)
    k0 = split * KS
    end = tl.minimum(k0 + KS, K)
    ups = no_sums(BITS, BM, BW)
    gates = no_sums(BITS, BM, BW)
    inputs = tl.zeros([BM], tl.float32)
    # As torch's hardshrink has it, so that batches drop the same.
    least = tl.full([BM], cut, tl.float32).to(x_ptr.dtype.element_ty).to(tl.float32)
    for k in tl.range(k0, end, BM, loop_unroll_factor=UNROLL):
        rk = k + tl.arange(0, BM)
        x = tl.load(x_ptr + rk, mask=rk < end, other=0.0).to(tl.float32)
        x = tl.where(tl.abs(x) <= least, 0.0, x)
        keep = x != 0.0  # as in column_kernels.py: NaN is kept, and a zero adds nothing whatever the cut is
        at = rk[:, None] * W + rw[None, :]
        ups = add_codes(ups, up_ptr, at, keep, x, BITS)
        if HAS_GATE:
            gates = add_codes(gates, gate_ptr, at, keep, x, BITS)
        inputs += x
    total = tl.sum(inputs, 0)
    outputs = W * (32 // BITS)
    part_ptr += split * outputs * (2 if HAS_GATE else 1)
    store_sums(ups, part_ptr, rw, W, total, BITS)
    if HAS_GATE:
        store_sums(gates, part_ptr + outputs, rw, W, total, BITS)


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

    tile: (channels of a load tile, tiles in flight, channels of a program), for tuning.
    """
    k, words = up.codes.shape
    n, outputs = len(up.scale), words * (32 // up.bits)
    strips = words // WORDS
    channels, unroll, of_program = tile or _tile(k, strips)
    splits, both = cdiv(k, of_program), gate is not None
    flat = x.reshape(-1).contiguous()
    part = torch.empty(splits, 1 + both, outputs, dtype=torch.float32, device=x.device)
    y = x.new_empty(2 if both and act is None else 1, *x.shape[:-1], n)
    first = up if gate is None else gate
    sums_kernel[(strips, splits)](
        flat, first.codes, up.codes, part, cut, k, of_program, words,
        HAS_GATE=both, BITS=up.bits, BW=WORDS, BM=channels, UNROLL=unroll, num_warps=1,
    )  # fmt: skip
    end_kernel[(cdiv(n, 64),)](
        part, first.scale, up.scale, flat if gate_bias is None else gate_bias, flat if up_bias is None else up_bias, y,
        n, outputs, splits,
        HAS_GATE=both, HAS_BG=gate_bias is not None, HAS_BU=up_bias is not None, ACT=act_code(act), DT=DTYPES[x.dtype],
        BN=64, BS=32, num_warps=4,
    )  # fmt: skip
    return y


def _tile(k: int, strips: int) -> tuple[int, int, int]:
    """(channels of a load tile, tiles in flight, channels of a program): by arithmetic, not by trial on a GPU."""
    splits = max(1, PROGRAMS // strips)
    return 8, 4, cdiv(cdiv(k, splits), 32) * 32


def few_bits_fits(x: Tensor, *weights: Channels | None) -> bool:
    """Whether `few_bits_product` takes x [..., d] by these weights: one row, of a known dtype, where they lie."""
    given = [w for w in weights if w is not None]
    shapes = {(w.codes.shape, w.bits, len(w.scale)) for w in given}
    return (
        x.dtype in DTYPES
        and 0 < x.numel() == x.shape[-1]
        and len(shapes) == 1
        and all(w.codes.device == x.device and len(w.codes) == x.numel() and w.codes.numel() < 1 << 31 for w in given)
    )
