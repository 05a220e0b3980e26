"""The Triton kernels of column.py: weights W^T [K, N]; a program owns `BN` outputs and a slice of the channels."""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.common import activate, clear_share, end_split

# What a kernel compares channels with.
KEEP_ALL = tl.constexpr(0)
NOT_ZERO = tl.constexpr(1)  # drop exact zeros
SCALAR = tl.constexpr(2)
PER_CHANNEL = tl.constexpr(3)


@triton.jit
def channel_values(x_ptr, up_ptr, rk, live, ACT: tl.constexpr, HAS_UP: tl.constexpr, DT: tl.constexpr):
    """X at channels rk as fp32; with ACT, x = act(gate) * up, each factor and the product rounded as a module does."""
    x = tl.load(x_ptr + rk, mask=live, other=0.0).to(DT).to(tl.float32)
    if ACT != 0:
        x = activate(x, ACT).to(DT).to(tl.float32)
        if HAS_UP:
            x = x * tl.load(up_ptr + rk, mask=live, other=0.0).to(DT).to(tl.float32)
            x = x.to(DT).to(tl.float32)
    return x


@triton.jit
def drop(x, t_ptr, segment, rk, live, K, TEST: tl.constexpr):
    """X with dropped channels zeroed; the thresholds of a segment of outputs are t[segment] or t[segment, rk].

    A zero is kept where the threshold is negative, so that the kernel at 0 % reads everything also where a ReLU made
    zeros. It becomes the smallest normal number, since callers tell what is kept by its not being zero.
    """
    if TEST == SCALAR:
        dropped = tl.abs(x) <= tl.load(t_ptr + segment)
        x = tl.where(dropped, 0.0, tl.where((x == 0.0) & live, 1.1754943508222875e-38, x))
    if TEST == PER_CHANNEL:
        dropped = tl.abs(x) <= tl.load(t_ptr + segment * K + rk, mask=live, other=0.0)
        x = tl.where(dropped, 0.0, tl.where((x == 0.0) & live, 1.1754943508222875e-38, x))
    return x


@triton.jit(do_not_specialize=["n_zero", "seg1", "seg2"])
def masked_kernel(
    x_ptr,
    up_ptr,
    t_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    zero_ptr,
    N,
    K,
    KS,
    n_zero,
    seg1,
    seg2,
    ACT: tl.constexpr,
    HAS_UP: tl.constexpr,
    TEST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HOW: tl.constexpr,
    EVEN_N: tl.constexpr,
    CLEAR: tl.constexpr,
    DT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    strip = tl.program_id(0)
    split = tl.program_id(1)
    rn = strip * BN + tl.arange(0, BN)
    if EVEN_N:
        live_n = tl.full([BN], 1, tl.int1)
    else:
        live_n = rn < N
    if CLEAR > 0:
        clear_share(zero_ptr, n_zero, CLEAR)
    segment = (strip * BN >= seg1).to(tl.int32) + (strip * BN >= seg2).to(tl.int32)
    k0 = split * KS
    end = tl.minimum(k0 + KS, K)
    acc = tl.zeros([BN], tl.float32)
    for k in range(k0, end, BM):
        rk = k + tl.arange(0, BM)
        live = rk < end
        x = channel_values(x_ptr, up_ptr, rk, live, ACT, HAS_UP, DT)
        x = drop(x, t_ptr, segment, rk, live, K, TEST)
        if TEST == KEEP_ALL:
            keep = live
        else:
            # Testing the value, not the comparison, makes ptxas issue every load of the tile before the first FMA
            # (more than 128 registers instead of 64). NaN differs from zero, so it is kept.
            keep = x != 0.0
        if EVEN_N:
            load = keep[:, None]
        else:
            load = keep[:, None] & live_n[None, :]
        w = tl.load(w_ptr + rk[:, None] * N + rn[None, :], mask=load, other=0.0, eviction_policy="evict_first")
        acc += tl.sum(w.to(tl.float32) * x[:, None], 0)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rn, mask=live_n, other=0.0).to(tl.float32)
    end_split(acc, rn, live_n, split, N, y_ptr, bias, HOW)


@triton.jit(do_not_specialize=["S", "m"])
def list_kernel(
    x_ptr,
    idx_ptr,
    m_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    m,
    N,
    S,
    BY_POSITION: tl.constexpr,
    DEVICE_COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HOW: tl.constexpr,
    EVEN_N: tl.constexpr,
    DT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """Channels idx[:m]; the value of channel idx[j] is x[idx[j]], or x[j] with BY_POSITION."""
    strip = tl.program_id(0)
    split = tl.program_id(1)
    rn = strip * BN + tl.arange(0, BN)
    live_n = rn < N
    if DEVICE_COUNT:
        m = tl.load(m_ptr)
    first = (split * m) // S
    last = ((split + 1) * m) // S
    acc = tl.zeros([BN], tl.float32)
    for j in range(first, last, BM):
        rj = j + tl.arange(0, BM)
        live = rj < last
        at = tl.load(idx_ptr + rj, mask=live, other=0)
        if BY_POSITION:
            x = tl.load(x_ptr + rj, mask=live, other=0.0)
        else:
            x = tl.load(x_ptr + at, mask=live, other=0.0)
        x = x.to(DT).to(tl.float32)
        if EVEN_N:
            load = live[:, None]
        else:
            load = live[:, None] & live_n[None, :]
        w = tl.load(w_ptr + at[:, None] * N + rn[None, :], mask=load, other=0.0, eviction_policy="evict_first")
        acc += tl.sum(w.to(tl.float32) * x[:, None], 0)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rn, mask=live_n, other=0.0).to(tl.float32)
    end_split(acc, rn, live_n, split, N, y_ptr, bias, HOW)


@triton.jit(do_not_specialize=["B"])
def batch_kernel(
    x_ptr,
    t_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    B,
    N,
    K,
    KS,
    TEST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HOW: tl.constexpr,
    DT: tl.constexpr,
    DOT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """2 to 16 rows: a channel is read if any row keeps it, and feeds a tensor-core product."""
    strip = tl.program_id(0)
    split = tl.program_id(1)
    rn = strip * BN + tl.arange(0, BN)
    live_n = rn < N
    rb = tl.arange(0, 16)
    k0 = split * KS
    end = tl.minimum(k0 + KS, K)
    acc = tl.zeros([16, BN], tl.float32)
    for k in range(k0, end, BM):
        rk = k + tl.arange(0, BM)
        live = rk < end
        x = tl.load(x_ptr + rb[:, None] * K + rk[None, :], mask=(rb < B)[:, None] & live[None, :], other=0.0).to(DT)
        if TEST == KEEP_ALL:
            keep = live
        else:
            x = drop(x.to(tl.float32), t_ptr, 0, rk[None, :], live[None, :], K, TEST)
            keep = tl.max((x != 0.0).to(tl.int32), 0) > 0
            x = x.to(DT)
        load = keep[:, None] & live_n[None, :]
        w = tl.load(w_ptr + rk[:, None] * N + rn[None, :], mask=load, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(x.to(DOT), w.to(DOT), acc, input_precision="ieee")
    at = rb[:, None] * N + rn[None, :]
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + rn, mask=live_n, other=0.0).to(tl.float32)[None, :]
    live_out = (rb < B)[:, None] & live_n[None, :]
    end_split(acc, at, live_out, split, B * N, y_ptr, bias, HOW)
