"""Decode attention: one new token over a KV cache, split over the cache (flash-decoding), one launch.

Every program takes one KV head and a stretch of the cache; the last program of a head to arrive combines the
stretches in a fixed order, so the result is bitwise repeatable. `attend_step` does a whole decoder step's attention:
rotary embedding of q and k, the write into the cache, and the attention.
Source of split-K decoding: Dao et al., "Flash-Decoding for long-context inference", 2023.
"""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda import workspace
from kernels.cuda.common import DTYPES, cdiv, dot_dtype, power_of_two

KEEP = {None: 0, "exclude": 1, "zeros": 2}
PROGRAMS = 132 * 4  # a head's cache is split until about this many programs share the work
LOG2E = 1.4426950408889634


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


@triton.jit(do_not_specialize=["length"])
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
    out_ptr,
    acc_ptr,
    top_ptr,
    count_ptr,
    length,
    scale,
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
    STAGES: tl.constexpr,
    DEVICE_LENGTH: tl.constexpr,
    MODE: tl.constexpr,
    STEP: tl.constexpr,
    ROTARY: tl.constexpr,
    DT: tl.constexpr,
    DOT: tl.constexpr,
):
    """One KV head (program 0) and one stretch of the cache (program 1). q, out: [B, G * R, D] rows.

    STEP: the cache holds `length` tokens; the new one comes in new_k, new_v [B * G, D], is rotated, written at
    position `length` and attended to. MODE: see KEEP.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    b = head // G
    g = head % G
    if DEVICE_LENGTH:
        length = tl.load(length_ptr).to(tl.int32)
    d = tl.arange(0, D)
    r = tl.arange(0, RP)
    live_r = r < R
    if ROTARY:
        cos = tl.load(cos_ptr + b * D + d).to(tl.float32)
        sin = tl.load(sin_ptr + b * D + d).to(tl.float32)
    else:
        cos = tl.zeros([D], tl.float32)
        sin = tl.zeros([D], tl.float32)
    q = rotated(q_ptr, head * R + r, d, live_r, cos, sin, D, DT, ROTARY)
    base = scale * 1.4426950408889634
    USE_DOT: tl.constexpr = RP > 1
    top = tl.full([RP], float("-inf"), tl.float32)
    mass = tl.zeros([RP], tl.float32)
    acc = tl.zeros([RP, D], tl.float32)

    stretch = tl.cdiv(length, SPLITS)
    first = split * stretch
    last = tl.minimum(first + stretch, length)
    for s in tl.range(first, last, BS, num_stages=STAGES):
        rs = s + tl.arange(0, BS)
        live = rs < last
        load = live
        if MODE != 0:
            if keep_group == 0:  # one mask for the whole group: what it drops is not read
                load = tl.load(keep_ptr + b * keep_batch + g * keep_head + rs, mask=live, other=0) != 0
        k = tl.load(
            k_ptr + b * k_batch + g * k_head + rs[:, None].to(tl.int64) * k_token + d[None, :],
            mask=load[:, None], other=0.0,
        )  # fmt: skip
        v = tl.load(
            v_ptr + b * v_batch + g * v_head + rs[:, None].to(tl.int64) * v_token + d[None, :],
            mask=load[:, None], other=0.0,
        )  # fmt: skip
        if USE_DOT:
            scores = tl.dot(q.to(DOT), tl.trans(k).to(DOT), input_precision="ieee") * base
        else:
            scores = tl.sum(k.to(tl.float32) * q, 1)[None, :] * base
        if MODE != 0:
            kept = tl.load(
                keep_ptr + b * keep_batch + g * keep_head + r[:, None] * keep_group + rs[None, :],
                mask=live_r[:, None] & live[None, :], other=0,
            ) != 0  # fmt: skip
            if MODE == 1:
                scores = tl.where(kept, scores, float("-inf"))
            else:
                scores = tl.where(kept, scores, 0.0)
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing kept so far
        p = tl.exp2(scores - shift[:, None])
        old = tl.exp2(top - shift)
        mass = mass * old + tl.sum(p, 1)
        if MODE == 2:
            p = tl.where(kept, p, 0.0)
        if USE_DOT:
            acc = acc * old[:, None] + tl.dot(p.to(DOT), v.to(DOT), input_precision="ieee")
        else:
            acc = acc * old[:, None] + tl.sum(tl.sum(p, 0)[:, None] * v.to(tl.float32), 0)[None, :]
        top = new_top

    if STEP:
        if split == 0:
            one = tl.arange(0, 1)
            new_k = rotated(new_k_ptr, head + one, d, one == 0, cos, sin, D, DT, ROTARY)
            new_v = tl.load(new_v_ptr + head * D + d).to(DT).to(tl.float32)
            at = length.to(tl.int64)
            new_k1 = tl.sum(new_k, 0)
            tl.store(k_ptr + b * k_batch + g * k_head + at * k_token + d, new_k1.to(DT))
            tl.store(v_ptr + b * v_batch + g * v_head + at * v_token + d, new_v.to(DT))
            score = tl.sum(q * new_k1[None, :], 1) * base
            new_top = tl.maximum(top, score)
            p = tl.exp2(score - new_top)
            old = tl.exp2(top - new_top)
            mass = mass * old + p
            acc = acc * old[:, None] + p[:, None] * new_v[None, :]
            top = new_top

    out_at = (head * R + r)[:, None] * D + d[None, :]
    if SPLITS == 1:
        mass = tl.where(mass == 0.0, 1.0, mass)  # nothing kept: 0
        tl.store(out_ptr + out_at, (acc / mass[:, None]).to(out_ptr.dtype.element_ty), mask=live_r[:, None])
    else:
        # scratch of this head: acc [SPLITS, R, D]; (top, mass) [2, R, SPLITS]
        tl.store(acc_ptr + (head * SPLITS + split) * R * D + r[:, None] * D + d[None, :], acc, mask=live_r[:, None])
        tl.store(top_ptr + (head * 2 * R + r) * SPLITS + split, top, mask=live_r)
        tl.store(top_ptr + (head * 2 * R + R + r) * SPLITS + split, mass, mask=live_r)
        tl.debug_barrier()
        arrived = tl.atomic_add(count_ptr + head, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            sp = tl.arange(0, SPLITS)
            for i in range(R):
                tops = tl.load(top_ptr + (head * 2 * R + i) * SPLITS + sp, cache_modifier=".cg")
                masses = tl.load(top_ptr + (head * 2 * R + R + i) * SPLITS + sp, cache_modifier=".cg")
                parts = tl.load(
                    acc_ptr + (head * SPLITS + sp)[:, None] * R * D + i * D + d[None, :], cache_modifier=".cg"
                )
                best = tl.max(tops, 0)
                best = tl.where(best == float("-inf"), 0.0, best)
                share = tl.exp2(tops - best)
                total_mass = tl.sum(masses * share, 0)
                total_mass = tl.where(total_mass == 0.0, 1.0, total_mass)  # nothing kept: 0
                total = tl.sum(parts * share[:, None], 0) / total_mass
                tl.store(out_ptr + (head * R + i) * D + d, total.to(out_ptr.dtype.element_ty))
            tl.store(count_ptr + head, 0)


def _tile(heads: int, s: int) -> tuple[int, int, int, int]:
    """(splits, cache entries of a load tile, warps, stages) for a cache of s entries."""
    return power_of_two(max(1, min(64, PROGRAMS // heads, cdiv(s, 64)))), 64, 4, 1


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
    new: tuple[Tensor, Tensor] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:
    b, g, s, d = k.shape
    if d & (d - 1) or d < 16:
        raise ValueError(f"head dimension must be a power of two >= 16, got {d}")
    if k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError("head vectors must be contiguous in the cache")
    ratio = n_heads // g
    splits, block, warps, stages = tile or _tile(b * g, s)
    partial = torch.empty(b * n_heads * splits * d, device=q.device, dtype=torch.float32)
    stats = torch.empty(b * n_heads * splits * 2, device=q.device, dtype=torch.float32)
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
    attend_kernel[(b * g, splits)](
        q, k, v, new[0] if new else q, new[1] if new else q, rotary[0] if rotary else q, rotary[1] if rotary else q,
        length if device_length else q, q if keep is None else keep, out, partial, stats,
        workspace.counters(q.device, b * g), 0 if device_length else length, scale,
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), *keep_args, g,
        R=ratio, RP=1 if ratio == 1 else max(16, power_of_two(ratio)), D=d, SPLITS=splits, BS=block, STAGES=stages,
        DEVICE_LENGTH=device_length, MODE=KEEP[dropped if keep is not None else None], STEP=new is not None,
        ROTARY=rotary is not None, DT=DTYPES[k.dtype], DOT=dot_dtype(k.dtype), num_warps=warps,
    )  # fmt: skip
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
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Attention of one new token over the first `length` >= 1 cache entries; returns [B, H, 1, D] in q's dtype.

    q: [B, H, 1, D]; k, v: [B, G, S, D], any strides with contiguous heads; length: int or 0-d integer tensor on the
    device. keep: bool [B, G, S] or [B, H, S]: with dropped="exclude" the others leave the softmax (and with [B, G, S]
    are not read), with "zeros" their key and value are 0 and keep their softmax mass. scale: default D**-0.5.
    tile: (splits, entries of a load tile, warps, stages), for tuning. Raises ValueError on a head dimension that is no power of two.
    """
    if dropped not in ("exclude", "zeros"):
        raise ValueError(f'dropped must be "exclude" or "zeros", got {dropped!r}')
    b, h, _, d = q.shape
    scale = d**-0.5 if scale is None else scale
    return _launch(
        q.contiguous(), k, v, length, torch.empty_like(q, memory_format=torch.contiguous_format), n_heads=h,
        scale=scale, keep=keep, dropped=dropped, tile=tile,
    )  # fmt: skip


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
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """A decoder step's attention in one launch, batch 1: rotate q and k, append k and v to the cache, attend.

    qkv: [(H + 2 G) * D], q then k then v, 16-bit or an fp32 accumulator. cos, sin: [D] of the new position (halves
    rotated, the Llama convention). k_cache, v_cache: [1, G, S, D], written at position `length` (0-d integer tensor:
    tokens already there). out: [H * D], written. Returns out.
    """
    g, d = k_cache.shape[1], k_cache.shape[3]
    q, k, v = qkv.split((n_heads * d, g * d, g * d))
    return _launch(
        q, k_cache, v_cache, length, out, n_heads=n_heads, scale=scale, new=(k, v), rotary=(cos, sin), tile=tile,
    )  # fmt: skip
