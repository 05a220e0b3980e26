# ruff: noqa: ANN001, ANN202 - Triton compiles the kernel's arguments by what they are, not by annotations
"""Attention of one new token per sequence over a key-value cache, for writing text at large batch.

One program a (sequence, key-value head): the query heads that share a key-value head are the rows of one
small matrix product, so that each key and value is read once. Bound by the bytes of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch path below serves every device
    triton = None


if triton is not None:

    @triton.jit(do_not_specialize=["length"])
    def _attend(
        q,
        k,
        v,
        out,
        length,
        capacity,
        scale,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        BLOCK: tl.constexpr,  # noqa: ANN001
    ):
        program = tl.program_id(0)
        rows = tl.arange(0, 16)  # the least that a matrix unit takes; GROUP of them are real
        dims = tl.arange(0, DIM)
        keys = tl.arange(0, BLOCK)
        at = (program * GROUP + rows[:, None]) * DIM + dims[None, :]
        real = rows[:, None] < GROUP
        query = tl.load(q + at, mask=real, other=0.0)
        base = program.to(tl.int64) * capacity * DIM
        top = tl.full([16], float("-inf"), tl.float32)
        total = tl.zeros([16], tl.float32)
        mixed = tl.zeros([16, DIM], tl.float32)
        for start in range(0, length, BLOCK):
            inside = start + keys < length
            where = base + (start + keys)[:, None] * DIM + dims[None, :]
            key = tl.load(k + where, mask=inside[:, None], other=0.0)
            score = tl.dot(query, tl.trans(key)) * scale
            score = tl.where(inside[None, :], score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, axis=1))
            shrink = tl.exp(top - new_top)
            weight = tl.exp(score - new_top[:, None])
            value = tl.load(v + where, mask=inside[:, None], other=0.0)
            mixed = mixed * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
            total = total * shrink + tl.sum(weight, axis=1)
            top = new_top
        tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=real)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, length: int, kernel: bool) -> Tensor:
    """Softmax attention of one token over the first `length` cache entries.

    q: [batch, heads, head_dim], query heads of one key-value head adjacent; k, v: [batch, kv_heads, capacity,
    head_dim], contiguous. Returns [batch, heads, head_dim]. `kernel`: the Triton kernel, else plain torch.
    """
    batch, heads, dim = q.shape
    kv_heads, capacity = k.shape[1], k.shape[2]
    if not kernel:
        mixed = functional.scaled_dot_product_attention(
            q.unsqueeze(2), k[:, :, :length], v[:, :, :length], enable_gqa=True
        )
        return mixed.squeeze(2)
    q = q.contiguous()
    out = torch.empty_like(q)
    _attend[(batch * kv_heads,)](
        q, k, v, out, length, capacity, dim**-0.5, GROUP=heads // kv_heads, DIM=dim, BLOCK=64, num_warps=4
    )
    return out
