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
ACCUMULATE = tl.constexpr(1)  # atomics into a running fp32 sum
PARTIALS = tl.constexpr(2)  # partial sums; a second launch adds them in a fixed order (bitwise repeatable)


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
def end_split(acc, at, live, split, size, y_ptr, bias, HOW: tl.constexpr):
    """End the split-K sum `acc` (fp32) of the outputs at offsets `at` (mask `live`); bias is added exactly once.

    y: the result (STORE), a running fp32 sum [size] (ACCUMULATE) or partials, fp32 [splits, size] (PARTIALS).
    """
    acc += tl.where(split == 0, bias, 0.0)
    if HOW == STORE:
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=live)
    elif HOW == PARTIALS:
        tl.store(y_ptr + split * size + at, acc, mask=live)
    else:
        tl.atomic_add(y_ptr + at, acc, mask=live, sem="relaxed")


@triton.jit
def clear_share(ptr, n, SHARE: tl.constexpr):
    """Clear this program's SHARE of an fp32 buffer [n] that a later kernel accumulates into (a 2-d grid)."""
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    at = program * SHARE + tl.arange(0, SHARE)
    tl.store(ptr + at, tl.zeros([SHARE], tl.float32), mask=at < n)


@triton.jit
def finish_kernel(sum_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """Write the running sum to y and make it zero again."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    total = tl.load(sum_ptr + at, mask=live, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=live)
    tl.store(sum_ptr + at, tl.zeros([BLOCK], tl.float32), mask=live)


def finish(total: torch.Tensor, y: torch.Tensor) -> None:
    """Round an fp32 running sum into y (any shape, contiguous) and clear it."""
    finish_kernel[(cdiv(y.numel(), 256),)](total, y, y.numel(), BLOCK=256, num_warps=2)


@triton.jit
def add_partials_kernel(part_ptr, y_ptr, size, S, BN: tl.constexpr, BS: tl.constexpr):
    """Sum: y[n] = sum over splits of part[s, n], always in the same order."""
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
