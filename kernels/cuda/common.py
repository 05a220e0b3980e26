"""Pieces that several Triton kernels share: activations, dtype names, the end of a split-K sum."""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# The interpreter has no bfloat16 products: there, matrix products run on fp32 copies of their operands.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

ACTIVATIONS = {None: 0, "silu": 1, "relu": 2, "relu2": 3, "gelu_tanh": 4, "gelu": 5}

# How a split-K kernel ends.
STORE = tl.constexpr(0)  # one split: the sum is the result
FINISH = tl.constexpr(1)  # atomics into a zero accumulator; the last program writes the result and clears it
PARTIALS = tl.constexpr(2)  # partial sums; a second launch adds them in a fixed order (bitwise repeatable)
ACCUMULATE = tl.constexpr(3)  # atomics into y itself, fp32: the caller's running sum


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The operand type of matrix products on tensors of this dtype."""
    return tl.float32 if INTERPRETED else DTYPES[dtype]


def act_code(act: str | None) -> int:
    """The kernels' number for an activation. Raises ValueError on an unknown name."""
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; known: {sorted(a for a in ACTIVATIONS if a)}")
    return ACTIVATIONS[act]


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def activate(v, ACT: tl.constexpr):
    """The activation of fp32 v; NaN passes."""
    if ACT == 1:
        v = v * tl.sigmoid(v)
    elif ACT == 2:
        v = tl.where(v < 0.0, 0.0, v)
    elif ACT == 3:
        v = tl.where(v < 0.0, 0.0, v)
        v = v * v
    elif ACT == 4:  # 0.5 v (1 + tanh u) = v sigmoid(2u), which has no cancellation
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACT == 5:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    return v


@triton.jit
def end_split(acc, at, live, strip, split, S, size, y_ptr, scratch_ptr, count_ptr, bias, HOW: tl.constexpr):
    """End the split-K sum `acc` (fp32) of the outputs at offsets `at` (mask `live`); bias is added exactly once.

    scratch: FINISH: fp32 [size], zero before and after; PARTIALS: fp32 [S, size].
    count: FINISH: int32, one for each strip, zero before and after.
    """
    if HOW == STORE:
        tl.store(y_ptr + at, (acc + bias).to(y_ptr.dtype.element_ty), mask=live)
    elif HOW == ACCUMULATE:
        tl.atomic_add(y_ptr + at, acc + tl.where(split == 0, bias, 0.0), mask=live, sem="relaxed")
    elif HOW == PARTIALS:
        tl.store(scratch_ptr + split * size + at, acc + tl.where(split == 0, bias, 0.0), mask=live)
    else:
        tl.atomic_add(scratch_ptr + at, acc, mask=live, sem="relaxed")
        tl.debug_barrier()  # every lane's additions come before the arrival below
        arrived = tl.atomic_add(count_ptr + strip, 1, sem="acq_rel")
        if arrived == S - 1:
            total = tl.load(scratch_ptr + at, mask=live, other=0.0, cache_modifier=".cg") + bias
            tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=live)
            tl.store(scratch_ptr + at, tl.zeros_like(total), mask=live)
            tl.store(count_ptr + strip, 0)


@triton.jit
def add_partials_kernel(part_ptr, y_ptr, size, S, BN: tl.constexpr, BS: tl.constexpr):
    """y[n] = sum over splits of part[s, n], always in the same order."""
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    live = at < size
    acc = tl.zeros([BN], tl.float32)
    for s in range(0, S, BS):
        rs = s + tl.arange(0, BS)
        part = tl.load(part_ptr + rs[:, None] * size + at[None, :], mask=(rs < S)[:, None] & live[None, :], other=0.0)
        acc += tl.sum(part, 0)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=live)


def add_partials(part: torch.Tensor, y: torch.Tensor) -> None:
    """Sum fp32 partials [S, size] into y [size] in a fixed order."""
    splits, size = part.shape
    add_partials_kernel[(cdiv(size, 64),)](part, y, size, splits, BN=64, BS=32, num_warps=4)
