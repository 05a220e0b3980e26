"""Decode attention that skips blocks of V: scores of all of K first, then V where a block's scores are not negligible.

Three launches. The first reads K, keeps every score and the largest of each block; the second reads the V of blocks
whose largest score comes near enough to the largest so far in the order of the cache; the third combines the stretches.
With one pass, as in a prompt's kernel, each stretch would know a running maximum of its own, and what is skipped would
depend on how the cache is split. K is read whole: at most half of the cache's bytes can be saved.
Source of the rule: BLASST (arXiv 2512.12087).
"""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.cuda.attention import combine_kernel
from kernels.cuda.common import cdiv, dot_dtype, power_of_two
from kernels.ran import by_torch


@triton.jit(do_not_specialize=["length"])
def score_kernel(
    q_ptr,
    k_ptr,
    score_ptr,
    peak_ptr,
    length_ptr,
    length,
    scale,
    k_batch,
    k_head,
    k_token,
    G,
    NB,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,
    DEVICE_LENGTH: tl.constexpr,
    DOT: tl.constexpr,
):
    """One KV head and one stretch of the cache: scores (base 2) [heads, R, NB * BS], and the largest of each block."""
    head = tl.program_id(0)
    if DEVICE_LENGTH:
        length = tl.load(length_ptr).to(tl.int32)
    d = tl.arange(0, D)
    r = tl.arange(0, RP)
    live_r = r < R
    q = tl.load(q_ptr + (head * R + r)[:, None] * D + d[None, :], mask=live_r[:, None], other=0.0)
    base = scale * 1.4426950408889634
    k_ptr += (head // G).to(tl.int64) * k_batch + (head % G) * k_head
    blocks = tl.cdiv(length, BS)
    stretch = tl.cdiv(blocks, SPLITS)
    first = tl.program_id(1) * stretch
    query = (head * R + r).to(tl.int64)
    for j in range(first, tl.minimum(first + stretch, blocks)):
        rs = j * BS + tl.arange(0, BS)
        live = rs < length
        k = tl.load(k_ptr + rs[:, None].to(tl.int64) * k_token + d[None, :], mask=live[:, None], other=0.0)
        if RP == 1:
            one = tl.sum(k.to(tl.float32) * tl.sum(q.to(tl.float32), 0)[None, :], 1) * base
            score = tl.where(live, one, float("-inf"))[None, :]
        else:
            score = tl.dot(q.to(DOT), tl.trans(k).to(DOT), input_precision="ieee") * base
            score = tl.where(live[None, :], score, float("-inf"))
        tl.store(score_ptr + query[:, None] * NB * BS + rs[None, :], score, mask=live_r[:, None])
        tl.store(peak_ptr + query * NB + j, tl.max(score, 1), mask=live_r)


@triton.jit(do_not_specialize=["length"])
def value_kernel(
    score_ptr,
    peak_ptr,
    v_ptr,
    length_ptr,
    acc_ptr,
    stat_ptr,
    length,
    log_scale,
    v_batch,
    v_head,
    v_token,
    G,
    NB,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,
    NBP: tl.constexpr,
    DEVICE_LENGTH: tl.constexpr,
    DOT: tl.constexpr,
):
    """One KV head and one stretch: the V of its blocks that any of the R query heads needs, for `combine_kernel`."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    if DEVICE_LENGTH:
        length = tl.load(length_ptr).to(tl.int32)
    d = tl.arange(0, D)
    r = tl.arange(0, RP)
    live_r = r < R
    query = (head * R + r).to(tl.int64)
    v_ptr += (head // G).to(tl.int64) * v_batch + (head % G) * v_head
    blocks = tl.cdiv(length, BS)
    stretch = tl.cdiv(blocks, SPLITS)
    first = split * stretch
    # ln(lambda) = ln(scale) - ln(length), at most 0, in base 2
    limit = tl.minimum(log_scale - tl.log(length.to(tl.float32)), 0.0) * 1.4426950408889634
    nb = tl.arange(0, NBP)
    there = live_r[:, None] & (nb < blocks)[None, :]
    peaks = tl.load(peak_ptr + query[:, None] * NB + nb[None, :], mask=there, other=float("-inf"))
    peak = tl.where(live_r, tl.max(peaks, 1), 0.0)
    running = tl.max(tl.where((nb < first)[None, :], peaks, float("-inf")), 1)
    mass = tl.zeros([RP], tl.float32)
    acc = tl.zeros([RP, D], tl.float32)
    for j in range(first, tl.minimum(first + stretch, blocks)):
        own = tl.load(peak_ptr + query * NB + j, mask=live_r, other=0.0)
        running = tl.maximum(running, own)
        needed = live_r & (own - running >= limit)
        if tl.max(needed.to(tl.int32), 0) > 0:
            rs = j * BS + tl.arange(0, BS)
            live = rs < length
            v = tl.load(v_ptr + rs[:, None].to(tl.int64) * v_token + d[None, :], mask=live[:, None], other=0.0)
            at = query[:, None] * NB * BS + rs[None, :]
            score = tl.load(score_ptr + at, mask=live_r[:, None] & live[None, :], other=float("-inf"))
            p = tl.exp2(score - peak[:, None])
            mass += tl.sum(p, 1)
            if RP == 1:
                acc += tl.sum(tl.trans(p) * v.to(tl.float32), 0)[None, :]
            else:
                acc += tl.dot(p.to(DOT), v.to(DOT), input_precision="ieee")
    at = query * SPLITS + split
    tl.store(acc_ptr + at[:, None] * D + d[None, :], acc, mask=live_r[:, None])
    tl.store(stat_ptr + query * 2 * SPLITS + split, peak, mask=live_r)
    tl.store(stat_ptr + query * 2 * SPLITS + SPLITS + split, mass, mask=live_r)


def skip_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | int,
    log_scale: float,
    block: int = 64,
    scale: float | None = None,
    *,
    splits: int | None = None,
) -> Tensor:
    """As the reference's, with length >= 1, an int too. V of blocks that no head of a group needs is not read.

    Blocks and head dimensions that are no powers of two >= 16 take the plain-torch definition. splits: for tuning.
    """
    b, h, _, d = q.shape
    g, s = k.shape[1:3]
    if d & (d - 1) or d < 16 or block & (block - 1) or block < 16 or k.stride(3) != 1 or v.stride(3) != 1:
        by_torch()
        return reference.skip_softmax(q, k, v, torch.as_tensor(length), log_scale, block, scale)
    ratio, blocks = h // g, cdiv(s, block)
    if splits is None:
        splits = power_of_two(max(1, min(64, 132 * 16 // (b * g), blocks)))
    score = torch.empty(b * h * blocks * block, device=q.device, dtype=torch.float32)
    peak = torch.empty(b * h * blocks, device=q.device, dtype=torch.float32)
    acc = torch.empty(b * h * splits * d, device=q.device, dtype=torch.float32)
    stat = torch.empty(b * h * splits * 2, device=q.device, dtype=torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    device_length = isinstance(length, Tensor)
    at = (length, 0) if device_length else (q, length)
    shape = {
        "R": ratio, "RP": 1 if ratio == 1 else max(16, power_of_two(ratio)), "D": d, "SPLITS": splits, "BS": block,
        "DEVICE_LENGTH": device_length, "DOT": dot_dtype(k.dtype), "num_warps": 4,
    }  # fmt: skip
    score_kernel[(b * g, splits)](
        q.contiguous(), k, score, peak, *at, d**-0.5 if scale is None else scale, *k.stride()[:3], g, blocks, **shape
    )
    value_kernel[(b * g, splits)](
        score,
        peak,
        v,
        at[0],
        acc,
        stat,
        at[1],
        log_scale,
        *v.stride()[:3],
        g,
        blocks,
        NBP=power_of_two(blocks),
        **shape,
    )
    combine_kernel[(b * h,)](acc, stat, out, SPLITS=splits, D=d, num_warps=4)
    return out
