"""Decode attention: one new token over a KV cache, split over the cache (flash-decoding), two launches.

Every program takes one KV head and a stretch of the cache; a second launch combines the stretches in a fixed order, so
the result is bitwise repeatable. `attend_step` does a whole decoder step's attention: rotary embedding of q and k, the
write into the cache, and the attention. Where a sequence drops a KV head, the programs of that head end without
reading its stretch: what is saved does not depend on what other sequences of the batch keep.
Source of split-K decoding: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.cuda.common import DTYPES, cdiv, dot_dtype, power_of_two
from kernels.ran import by_torch

KEEP = {None: 0, "exclude": 1, "zeros": 2}
# How a sequence's KV heads are chosen: all of them, by flags, or those of the largest scores.
ALL, FLAGS, TOP = (tl.constexpr(i) for i in range(3))


@triton.jit
def rotated(ptr, row, d, live, cos, sin, D: tl.constexpr, DT: tl.constexpr, ROTARY: tl.constexpr):
    """Head vectors at `row` [R] of ptr ([rows, D], fp32 or DT), rounded to DT, with rotary embedding: fp32 [R, D]."""
    v = tl.load(ptr + row[:, None] * D + d[None, :], mask=live[:, None], other=0.0).to(DT).to(tl.float32)
    if ROTARY:
        half: tl.constexpr = D // 2
        other = tl.where(d < half, d + half, d - half)
        w = tl.load(ptr + row[:, None] * D + other[None, :], mask=live[:, None], other=0.0).to(DT).to(tl.float32)
        w = tl.where((d < half)[None, :], -w, w)
        v = (v * cos[None, :]).to(DT).to(tl.float32) + (w * sin[None, :]).to(DT).to(tl.float32)
    return v.to(DT).to(tl.float32)


@triton.jit
def chosen(ptr, g, heads, stride, top, HOW: tl.constexpr, GP: tl.constexpr):
    """Whether a sequence keeps KV head g of `heads`: by its flag at ptr, or being among its `top` largest scores there.

    Of equal scores the first counts as larger.
    """
    own = tl.load(ptr + g * stride).to(tl.float32)
    if HOW == FLAGS:
        kept = own != 0.0
    else:
        at = tl.arange(0, GP)
        score = tl.load(ptr + at * stride, mask=at < heads, other=float("-inf")).to(tl.float32)
        before = (score > own) | ((score == own) & (at < g))
        kept = tl.sum((before & (at < heads)).to(tl.int32), 0) < top
    return kept


@triton.jit(do_not_specialize=["length", "top"])
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    new_k_ptr,
    new_v_ptr,
    cos_ptr,
    sin_ptr,
    length_ptr,
    keep_ptr,
    choice_ptr,
    acc_ptr,
    stat_ptr,
    length,
    scale,
    top,
    q_batch,
    new_batch,
    rotary_batch,
    choice_batch,
    choice_head,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    keep_batch,
    keep_head,
    keep_group,
    G,
    R: tl.constexpr,
    RP: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BS: tl.constexpr,
    DEVICE_LENGTH: tl.constexpr,
    MODE: tl.constexpr,
    CHOICE: tl.constexpr,
    GP: tl.constexpr,
    STEP: tl.constexpr,
    ROTARY: tl.constexpr,
    DT: tl.constexpr,
    DOT: tl.constexpr,
):
    """One KV head (program 0) and one stretch of the cache (program 1), for R query heads (RP = R padded, 1 for one).

    Leaves for `combine_kernel`: acc [heads, R, SPLITS, D], and stat [heads, R, 2, SPLITS]: the stretch's largest score
    (base 2) and its softmax mass. STEP: the cache holds `length` tokens; the new one comes in new_k, new_v [heads, D],
    is rotated, written at position `length` and attended to. MODE: see KEEP. CHOICE: how KV heads are chosen; one that
    is not reads nothing of the cache, and its new token is written all the same.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    b = (head // G).to(tl.int64)
    g = head % G
    if DEVICE_LENGTH:
        length = tl.load(length_ptr).to(tl.int32)
    d = tl.arange(0, D)
    r = tl.arange(0, RP)
    live_r = r < R
    if ROTARY:
        cos = tl.load(cos_ptr + b * rotary_batch + d).to(tl.float32)
        sin = tl.load(sin_ptr + b * rotary_batch + d).to(tl.float32)
    else:
        cos = tl.zeros([D], tl.float32)
        sin = tl.zeros([D], tl.float32)
    q = rotated(q_ptr + b * q_batch, g * R + r, d, live_r, cos, sin, D, DT, ROTARY)
    base = scale * 1.4426950408889634
    k_ptr += b * k_batch + g * k_head
    v_ptr += b * v_batch + g * v_head
    keep_ptr += b * keep_batch + g * keep_head
    stretch = tl.cdiv(length, SPLITS)
    first = split * stretch
    last = tl.minimum(first + stretch, length)
    own = 0.0  # what a dropped head's new token would add to every score
    if CHOICE != ALL:
        kept = chosen(choice_ptr + b * choice_batch, g, G, choice_head, top, CHOICE, GP)
        last = tl.where(kept, last, first)
        own = tl.where(kept, 0.0, float("-inf"))
    # One query head keeps its state in scalars and one row, so that a program of one warp needs no shared memory.
    if RP == 1:
        q1 = tl.sum(q, 0)
        peak = float("-inf")
        mass = 0.0
        acc = tl.zeros([D], tl.float32)
    else:
        peak = tl.full([RP], float("-inf"), tl.float32)
        mass = tl.zeros([RP], tl.float32)
        acc = tl.zeros([RP, D], tl.float32)
    for s in range(first, last, BS):
        rs = s + tl.arange(0, BS)
        live = rs < last
        load = live
        if MODE != 0:
            if keep_group == 0:  # one mask for the whole group: what it drops is not read
                load = tl.load(keep_ptr + rs, mask=live, other=0) != 0
        row = rs[:, None].to(tl.int64)
        k = tl.load(k_ptr + row * k_token + d[None, :], mask=load[:, None], other=0.0)
        v = tl.load(v_ptr + row * v_token + d[None, :], mask=load[:, None], other=0.0)
        if RP == 1:
            score = tl.sum(k.to(tl.float32) * q1[None, :], 1) * base
            if MODE != 0:
                score = tl.where(load, score, 0.0 if MODE == 2 else float("-inf"))
            score = tl.where(live, score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 0))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing kept so far
            p = tl.exp2(score - shift)
            old = tl.exp2(peak - shift)
            mass = mass * old + tl.sum(p, 0)
            acc = acc * old + tl.sum(p[:, None] * v.to(tl.float32), 0)
        else:
            score = tl.dot(q.to(DOT), tl.trans(k).to(DOT), input_precision="ieee") * base
            if MODE != 0:
                at = r[:, None] * keep_group + rs[None, :]
                kept = tl.load(keep_ptr + at, mask=live_r[:, None] & live[None, :], other=0) != 0
                score = tl.where(kept, score, 0.0 if MODE == 2 else float("-inf"))
            score = tl.where(live[None, :], score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            p = tl.exp2(score - shift[:, None])
            old = tl.exp2(peak - shift)
            mass = mass * old + tl.sum(p, 1)
            if MODE == 2:
                p = tl.where(kept, p, 0.0)
            acc = acc * old[:, None] + tl.dot(p.to(DOT), v.to(DOT), input_precision="ieee")
        peak = new_peak
    if STEP:
        if split == SPLITS - 1:
            one = tl.arange(0, 1)
            new_k = tl.sum(rotated(new_k_ptr + b * new_batch, g + one, d, one == 0, cos, sin, D, DT, ROTARY), 0)
            new_v = tl.load(new_v_ptr + b * new_batch + g * D + d).to(DT).to(tl.float32)
            at = length.to(tl.int64)
            tl.store(k_ptr + at * k_token + d, new_k.to(DT))
            tl.store(v_ptr + at * v_token + d, new_v.to(DT))
            if RP == 1:
                score = tl.sum(q1 * new_k, 0) * base + own
            else:
                score = tl.sum(q * new_k[None, :], 1) * base + own
            new_peak = tl.maximum(peak, score)
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            p = tl.exp2(score - shift)
            old = tl.exp2(peak - shift)
            mass = mass * old + p
            if RP == 1:
                acc = acc * old + p * new_v
            else:
                acc = acc * old[:, None] + p[:, None] * new_v[None, :]
            peak = new_peak
    if RP == 1:
        tl.store(acc_ptr + (head * SPLITS + split) * D + d, acc)
        tl.store(stat_ptr + head * 2 * SPLITS + split, peak)
        tl.store(stat_ptr + head * 2 * SPLITS + SPLITS + split, mass)
    else:
        query = head * R + r
        tl.store(acc_ptr + (query * SPLITS + split)[:, None] * D + d[None, :], acc, mask=live_r[:, None])
        tl.store(stat_ptr + query * 2 * SPLITS + split, peak, mask=live_r)
        tl.store(stat_ptr + query * 2 * SPLITS + SPLITS + split, mass, mask=live_r)


@triton.jit
def combine_kernel(acc_ptr, stat_ptr, out_ptr, SPLITS: tl.constexpr, D: tl.constexpr):
    """One query head: the stretches' results, weighted by their share of the softmax mass, in a fixed order."""
    query = tl.program_id(0)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, D)
    peak = tl.load(stat_ptr + query * 2 * SPLITS + s)
    mass = tl.load(stat_ptr + query * 2 * SPLITS + SPLITS + s)
    some = (peak != float("-inf"))[:, None]
    acc = tl.load(acc_ptr + (query * SPLITS + s)[:, None] * D + d[None, :], mask=some, other=0.0)
    best = tl.max(peak, 0)
    share = tl.exp2(peak - tl.where(best == float("-inf"), 0.0, best))
    total = tl.sum(mass * share, 0)
    total = tl.where(total == 0.0, 1.0, total)  # nothing kept: 0
    out = tl.sum(acc * share[:, None], 0) / total
    tl.store(out_ptr + query * D + d, out.to(out_ptr.dtype.element_ty))


def _tile(heads: int, ratio: int, s: int) -> tuple[int, int, int]:
    """(splits, cache entries of a load tile, warps) for a cache of s entries, by bench/gpu_kernels.py --tune.

    Few heads get one wave of programs; those of a batch several, so that dropped heads leave no processor idle.
    """
    block, warps = (16, 1) if ratio == 1 else (64, 4)
    programs = 132 * (16 if ratio == 1 else 4)
    if heads > 128:
        programs *= 4
    return power_of_two(max(1, min(64, programs // heads, cdiv(s, block)))), block, warps


@dataclass(frozen=True)
class Choice:
    """Which KV heads each sequence reads. values: [B, G], flags, or scores of which the `top` largest stay.

    Strides are free, so that the scores may be columns of a merged projection.
    """

    values: Tensor
    top: int | None = None


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | int,
    out: Tensor,
    *,
    n_heads: int,
    scale: float,
    keep: Tensor | None = None,
    dropped: str | None = None,
    choice: Choice | None = None,
    new: tuple[Tensor, Tensor] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """q: [B, H * D], new: two of [B, G * D], rotary: two of [B or 1, D]; contiguous but for the first dimension."""
    b, g, s, d = k.shape
    ratio = n_heads // g
    splits, block, warps = tile or _tile(b * g, ratio, s)
    acc = torch.empty(b * n_heads * splits * d, device=q.device, dtype=torch.float32)
    stat = torch.empty(b * n_heads * splits * 2, device=q.device, dtype=torch.float32)
    device_length = isinstance(length, Tensor)
    if keep is None:
        keep_args = (0, 0, 0)
    else:
        if keep.stride(2) != 1:
            keep = keep.contiguous()
        per_head = keep.shape[1] == n_heads and ratio > 1
        keep = keep.view(torch.uint8)
        keep_args = (
            keep.stride(0),
            keep.stride(1) * (ratio if per_head else 1),
            keep.stride(1) if per_head else 0,
        )
    values, how = q, ALL.value
    if choice is not None:
        flags = choice.values.dtype == torch.bool
        values, how = (
            choice.values.view(torch.uint8) if flags else choice.values,
            (FLAGS if choice.top is None else TOP).value,
        )
    attend_kernel[(b * g, splits)](
        q, k, v, new[0] if new else q, new[1] if new else q, rotary[0] if rotary else q, rotary[1] if rotary else q,
        length if device_length else q, q if keep is None else keep, values, acc, stat,
        0 if device_length else length, scale, (choice.top or 0) if choice else 0,
        q.stride(0), new[0].stride(0) if new else 0, rotary[0].stride(0) if rotary and len(rotary[0]) > 1 else 0,
        values.stride(0) if choice else 0, values.stride(1) if choice else 0,
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), *keep_args, g,
        R=ratio, RP=1 if ratio == 1 else max(16, power_of_two(ratio)), D=d, SPLITS=splits, BS=block,
        DEVICE_LENGTH=device_length, MODE=KEEP[dropped if keep is not None else None], CHOICE=how, GP=power_of_two(g),
        STEP=new is not None, ROTARY=rotary is not None, DT=DTYPES[k.dtype], DOT=dot_dtype(k.dtype), num_warps=warps,
    )  # fmt: skip
    combine_kernel[(b * n_heads,)](acc, stat, out, SPLITS=splits, D=d, num_warps=4)
    return out


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | int,
    keep: Tensor | None = None,
    dropped: str = "exclude",
    scale: float | None = None,
    *,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """As the reference's, with length >= 1, an int too. Entries that [B, G, S] excludes are not read.

    Nor is anything of a group that [B, G, 1] or [B, H, 1] drops. k, v: any strides with contiguous heads; a head
    dimension that is no power of two >= 16 takes the plain-torch definition. tile: (splits, entries of a load tile,
    warps).
    """
    if dropped not in ("exclude", "zeros"):
        raise ValueError(f'dropped must be "exclude" or "zeros", got {dropped!r}')
    b, h, _, d = q.shape
    if d & (d - 1) or d < 16 or k.stride(3) != 1 or v.stride(3) != 1:
        by_torch()
        return reference.decode_attention(q, k, v, torch.as_tensor(length), keep, dropped, scale)
    choice, heads = None, None
    if keep is not None and keep.shape[2] == 1 and k.shape[2] > 1:
        if keep.shape[1] == k.shape[1]:
            choice = Choice(keep[..., 0])
        else:
            choice, heads = Choice(keep.view(b, k.shape[1], -1).any(-1)), keep
        keep = None
    out = _launch(
        q.reshape(b, -1).contiguous(), k, v, length, torch.empty_like(q, memory_format=torch.contiguous_format),
        n_heads=h, scale=d**-0.5 if scale is None else scale, keep=keep, dropped=dropped, choice=choice, tile=tile,
    )  # fmt: skip
    return out if heads is None else torch.where(heads[..., None], out, 0)


def attend_step(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: Tensor,
    out: Tensor,
    *,
    n_heads: int,
    scale: float,
    choice: Choice | None = None,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """A decoder step's attention: rotate q and k, append k and v to the cache, attend to the chosen KV heads.

    qkv: [B, >= (H + 2 G) * D], q then k then v, 16-bit or an fp32 accumulator (1-d for one sequence). cos, sin: [D] or
    [B, D] of the new position (halves rotated, the Llama convention). k_cache, v_cache: [B, G, S, D], written at
    position `length` (0-d integer tensor: tokens already there). out: [B, H * D], written. Returns out.
    """
    g, d = k_cache.shape[1], k_cache.shape[3]
    rows = qkv.view(1, -1) if qkv.dim() == 1 else qkv
    q, k, v = rows[:, : (n_heads + 2 * g) * d].split((n_heads * d, g * d, g * d), dim=1)
    return _launch(
        q, k_cache, v_cache, length, out, n_heads=n_heads, scale=scale, choice=choice, new=(k, v),
        rotary=(cos.view(-1, d), sin.view(-1, d)), tile=tile,
    )  # fmt: skip
