"""Row-major kernels (weights [N, K], one row an output): dense GEMV, listed rows, the neuron-sparse and CATS MLPs.

A program owns whole rows, so nothing is split: every result here is bitwise repeatable (the down projection of the
MLPs goes through the column kernels and follows their rule).
"""

# ruff: noqa: ANN001, ANN201, D103  (Triton's functions take pointers and blocks, which have no Python types)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.column import column, column_list, fast_path, glu
from kernels.cuda.common import DTYPES, act_code, activate, cdiv
from kernels.ran import by_torch


@triton.jit
def dot_rows(x_ptr, w_ptr, row, live, K, EVEN_K: tl.constexpr, DT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr):
    """fp32 [BR]: the products of x with rows `row` of w (not read where not live)."""
    acc = tl.zeros([BR, BK], tl.float32)
    for k in range(0, K, BK):
        rk = k + tl.arange(0, BK)
        if EVEN_K:
            x = tl.load(x_ptr + rk).to(DT).to(tl.float32)
            load = live[:, None]
        else:
            x = tl.load(x_ptr + rk, mask=rk < K, other=0.0).to(DT).to(tl.float32)
            load = live[:, None] & (rk < K)[None, :]
        w = tl.load(w_ptr + row[:, None] * K + rk[None, :], mask=load, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * x[None, :]
    return tl.sum(acc, 1)


@triton.jit
def add_bias(v, bias_ptr, row, live, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        v += tl.load(bias_ptr + row, mask=live, other=0.0).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["m"])
def rows_kernel(
    x_ptr,
    w_ptr,
    idx_ptr,
    m_ptr,
    bias_ptr,
    t_ptr,
    y_ptr,
    m,
    K,
    HAS_IDX: tl.constexpr,
    DEVICE_COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADD: tl.constexpr,
    ACT: tl.constexpr,
    T_MODE: tl.constexpr,
    EVEN_K: tl.constexpr,
    DT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """y[row] = act(x . w[row] + bias) for all rows or the listed ones; ADD: y[row] += it.

    T_MODE 1 (scalar) and 2 (per row): a result that its threshold drops becomes zero.
    """
    if DEVICE_COUNT:
        m = tl.load(m_ptr)
    for j in range(tl.program_id(0) * BR, m, tl.num_programs(0) * BR):
        rj = j + tl.arange(0, BR)
        live = rj < m
        row = rj
        if HAS_IDX:
            row = tl.load(idx_ptr + rj, mask=live, other=0)
        if ADD:  # asked for early: its latency hides behind the row
            before = tl.load(y_ptr + row, mask=live, other=0.0).to(tl.float32)
        v = dot_rows(x_ptr, w_ptr, row, live, K, EVEN_K, DT, BR, BK)
        v = add_bias(v, bias_ptr, row, live, HAS_BIAS)
        if ACT != 0:
            v = activate(v.to(DT).to(tl.float32), ACT).to(DT).to(tl.float32)
        if T_MODE == 1:
            v = tl.where(tl.abs(v) <= tl.load(t_ptr), 0.0, v)
        if T_MODE == 2:
            v = tl.where(tl.abs(v) <= tl.load(t_ptr + row, mask=live, other=0.0), 0.0, v)
        if ADD:
            v += before
        tl.store(y_ptr + row, v.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["m"])
def neurons_kernel(
    x_ptr,
    wg_ptr,
    wu_ptr,
    idx_ptr,
    m_ptr,
    bg_ptr,
    bu_ptr,
    h_ptr,
    m,
    K,
    HAS_GATE: tl.constexpr,
    HAS_IDX: tl.constexpr,
    DEVICE_COUNT: tl.constexpr,
    HAS_BG: tl.constexpr,
    HAS_BU: tl.constexpr,
    ACT: tl.constexpr,
    EVEN_K: tl.constexpr,
    DT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """h[j] = act(gate) * up (act(up) without gate) of neuron idx[j], or of neuron j without a list."""
    if DEVICE_COUNT:
        m = tl.load(m_ptr)
    for j in range(tl.program_id(0) * BR, m, tl.num_programs(0) * BR):
        rj = j + tl.arange(0, BR)
        live = rj < m
        row = rj
        if HAS_IDX:
            row = tl.load(idx_ptr + rj, mask=live, other=0)
        if HAS_GATE:
            gates = tl.zeros([BR, BK], tl.float32)
        ups = tl.zeros([BR, BK], tl.float32)
        for k in range(0, K, BK):
            rk = k + tl.arange(0, BK)
            at = row[:, None] * K + rk[None, :]
            if EVEN_K:
                x = tl.load(x_ptr + rk).to(DT).to(tl.float32)
                load = live[:, None]
            else:
                x = tl.load(x_ptr + rk, mask=rk < K, other=0.0).to(DT).to(tl.float32)
                load = live[:, None] & (rk < K)[None, :]
            if HAS_GATE:
                g = tl.load(wg_ptr + at, mask=load, other=0.0, eviction_policy="evict_first")
            u = tl.load(wu_ptr + at, mask=load, other=0.0, eviction_policy="evict_first")
            if HAS_GATE:
                gates += g.to(tl.float32) * x[None, :]
            ups += u.to(tl.float32) * x[None, :]
        up = add_bias(tl.sum(ups, 1), bu_ptr, row, live, HAS_BU).to(DT).to(tl.float32)
        if HAS_GATE:
            gate = add_bias(tl.sum(gates, 1), bg_ptr, row, live, HAS_BG).to(DT).to(tl.float32)
            h = activate(gate, ACT).to(DT).to(tl.float32) * up
        else:
            h = activate(up, ACT)
        tl.store(h_ptr + rj, h.to(h_ptr.dtype.element_ty), mask=live)


@triton.jit
def rows_where_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    bias_ptr,
    y_ptr,
    N,
    K,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    DT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """y[i] = a[i] * (x . w[i] + bias[i]) where a[i] is not zero, else 0; rows of w where it is zero are not read."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    live = row < N
    a = tl.load(a_ptr + row, mask=live, other=0).to(tl.float32)
    keep = a != 0.0
    if tl.max(keep.to(tl.int32), 0) > 0:
        v = dot_rows(x_ptr, w_ptr, row, keep, K, EVEN_K, DT, BR, BK)
        v = add_bias(v, bias_ptr, row, keep, HAS_BIAS).to(DT).to(tl.float32)
        tl.store(y_ptr + row, (a * v).to(y_ptr.dtype.element_ty), mask=live)
    else:
        tl.store(y_ptr + row, a.to(y_ptr.dtype.element_ty), mask=live)


def _block_k(k: int, widest: int) -> int:
    width = 1 << max(4, (k - 1).bit_length())
    return min(width, widest)


def rows(
    x: Tensor,
    w: Tensor,
    *,
    y: Tensor,
    idx: Tensor | None = None,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    add: bool = False,
    act: str | None = None,
    t: Tensor | None = None,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """One launch of the row kernel for one row x [K]; returns y [N]: written (or, with `add`, added to) at the listed
    rows, elsewhere untouched. tile: (rows, K tile, warps).
    """
    n, k = w.shape
    br, bk, warps = tile or (1, 4096, 8)
    bk = _block_k(k, bk)
    m = n if idx is None else idx.numel()
    grid = max(1, cdiv(m, br))
    rows_kernel[(grid,)](
        x, w, x if idx is None else idx, x if count is None else count, x if bias is None else bias,
        x if t is None else t, y, m, k,
        HAS_IDX=idx is not None, DEVICE_COUNT=count is not None, HAS_BIAS=bias is not None, ADD=add, ACT=act_code(act),
        T_MODE=0 if t is None else (1 if t.numel() == 1 else 2), EVEN_K=k % bk == 0, DT=DTYPES[w.dtype], BR=br, BK=bk,
        num_warps=warps,
    )  # fmt: skip
    return y


def rows_where(x: Tensor, w: Tensor, a: Tensor, *, y: Tensor, widest: int, bias: Tensor | None = None) -> Tensor:
    """One launch for one row x [K]: y = a * (w x + bias), [N], of which only rows of w where a is not zero are read."""
    n, k = w.shape
    bk = _block_k(k, widest)
    rows_where_kernel[(n,)](
        x, w, a, x if bias is None else bias, y, n, k,
        HAS_BIAS=bias is not None, EVEN_K=k % bk == 0, DT=DTYPES[w.dtype], BR=1, BK=bk, num_warps=4,
    )  # fmt: skip
    return y


def neurons(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    *,
    h: Tensor,
    act: str,
    idx: Tensor | None = None,
    count: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """One launch: h[j] = act(gate) * up of the listed neurons (of all without a list) for one row x [K]; returns h."""
    f, k = w_up.shape
    m = f if idx is None else idx.numel()
    br, bk, warps = tile or ((1, 2048, 4) if m > 4096 else (1, 4096, 8))
    bk = _block_k(k, bk)
    grid = max(1, cdiv(m, br))
    neurons_kernel[(grid,)](
        x, w_up if w_gate is None else w_gate, w_up, x if idx is None else idx, x if count is None else count,
        x if b_gate is None else b_gate, x if b_up is None else b_up, h, m, k,
        HAS_GATE=w_gate is not None, HAS_IDX=idx is not None, DEVICE_COUNT=count is not None,
        HAS_BG=b_gate is not None, HAS_BU=b_up is not None, ACT=act_code(act), EVEN_K=k % bk == 0,
        DT=DTYPES[w_up.dtype], BR=br, BK=bk, num_warps=warps,
    )  # fmt: skip
    return h


def dense_gemv_rows(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """As the reference's; one row on the fast path."""
    if not fast_path(x, w):
        by_torch()
        return torch.nn.functional.linear(x, w, bias)
    y = x.new_empty(*x.shape[:-1], w.shape[0])
    rows(x.reshape(-1).contiguous(), w, y=y.view(-1), bias=bias)
    return y


def row_gemv_index(
    x: Tensor, w: Tensor, idx: Tensor, bias: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """As the reference's, with `count`."""
    if fast_path(x, w):
        y = x.new_zeros(*x.shape[:-1], w.shape[0])
        rows(x.reshape(-1).contiguous(), w, y=y.view(-1), idx=idx, count=count, bias=bias)
        return y
    by_torch()
    return torch.nn.functional.linear(x, w, bias) * _listed(idx, count, w.shape[0]).to(x.dtype)


def row_gemv_mask(x: Tensor, w: Tensor, keep: Tensor, bias: Tensor | None = None) -> Tensor:
    """`row_gemv_index` of the outputs where keep (bool [N]) is True: a list's length is known on the host alone."""
    if not fast_path(x, w):
        by_torch()
        return torch.where(keep, torch.nn.functional.linear(x, w, bias), 0)
    y = x.new_empty(*x.shape[:-1], w.shape[0])
    ones = keep.contiguous().view(torch.uint8)
    return rows_where(x.reshape(-1).contiguous(), w, ones, y=y.view(-1), bias=bias, widest=4096).view_as(y)


def _listed(idx: Tensor, count: Tensor | None, n: int) -> Tensor:
    counts = torch.arange(idx.numel(), device=idx.device) < (idx.numel() if count is None else count)
    return torch.zeros(n, dtype=torch.int32, device=idx.device).index_add_(0, idx, counts.int()) > 0


def neuron_mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    wt_down: Tensor,
    idx: Tensor,
    act: str,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """As the reference's, with `count`. Two launches."""
    if fast_path(x, w_gate, w_up, wt_down):
        h = torch.empty(idx.numel(), dtype=w_up.dtype, device=x.device)
        flat = x.reshape(-1).contiguous()
        neurons(flat, w_gate, w_up, h=h, act=act, idx=idx, count=count, b_gate=b_gate, b_up=b_up)
        y = x.new_empty(*x.shape[:-1], wt_down.shape[1])
        column_list(h, wt_down, idx, y=y.view(-1), count=count, by_position=True, bias=b_down)
        return y
    by_torch()
    up = torch.nn.functional.linear(x, w_up, b_up)
    h = glu(up, None, act) if w_gate is None else glu(torch.nn.functional.linear(x, w_gate, b_gate), up, act)
    y = torch.where(_listed(idx, count, w_up.shape[0]), h, 0) @ wt_down
    return y if b_down is None else y + b_down


def cats_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, wt_down: Tensor, t: Tensor, act: str) -> Tensor:
    """As the reference's. Three launches."""
    if fast_path(x, w_gate, w_up, wt_down):
        flat = x.reshape(-1).contiguous()
        a = rows(flat, w_gate, y=torch.empty(len(w_up), dtype=w_gate.dtype, device=x.device), act=act, t=t)
        h = rows_where(flat, w_up, a, y=torch.empty_like(a), widest=2048)
        y = x.new_empty(*x.shape[:-1], wt_down.shape[1])
        column(h, wt_down, 0.0, y=y.view(-1), expected_sparsity=1.0)
        return y
    by_torch()
    a = glu(torch.nn.functional.linear(x, w_gate), None, act)
    a = torch.where(a.abs().float() <= t, 0, a)
    return (a * torch.nn.functional.linear(x, w_up)) @ wt_down
