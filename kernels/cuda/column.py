"""Column-sparse GEMV on W^T [K, N]: input channels that a threshold or a list drops are never read.

Weights lie channel by channel (`wt[i]` = what channel i adds to every output), so a dropped channel is a contiguous
row that is not loaded. A program owns `BN` outputs and a slice of the channels; partial sums meet in fp32 atomics
(or, under `torch.use_deterministic_algorithms(True)`, in partials that a second launch adds in a fixed order).

Three forms, the same result:
  masked   one tile of loads, each predicated by the channel's threshold test: best up to about 60 % zeros;
  compact  each block first packs the channels that it keeps: best above, where masked spends its time on zeros (CUDA
           C++, see compact.py);
  list     the channels are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cuda import compact, workspace
from kernels.cuda.column_kernels import (
    KEEP_ALL,
    NOT_ZERO,
    PER_CHANNEL,
    SCALAR,
    batch_kernel,
    list_kernel,
    masked_kernel,
)
from kernels.cuda.common import (
    ACCUMULATE,
    DTYPES,
    PARTIALS,
    STORE,
    act_code,
    add_partials,
    cdiv,
    dot_dtype,
    finish,
    power_of_two,
)
from kernels.ran import by_torch

COMPACT_FROM = 0.6  # expected share of dropped channels from which the compact form is the faster one
MAX_ROWS = 16  # more rows than this multiply densely


def _test(t: Tensor | float | None, channels: int, parts: int = 1) -> tuple[int, Tensor | None]:
    if t is None:
        return KEEP_ALL.value, None
    if not isinstance(t, Tensor):
        if t != 0:
            raise ValueError("a threshold other than 0 must be an fp32 tensor on the device")
        return NOT_ZERO.value, None
    if t.dtype != torch.float32 or not t.is_contiguous():
        raise ValueError("thresholds must be contiguous fp32")
    if t.numel() == parts:
        return SCALAR.value, t
    if t.numel() == parts * channels:
        return PER_CHANNEL.value, t
    raise ValueError(f"thresholds of shape {tuple(t.shape)} fit neither [{parts}] nor [{parts}, {channels}]")


class Sums:
    """Where the partial sums of one split-K launch go, and what turns them into y."""

    def __init__(self, y: Tensor, splits: int, accumulate: bool) -> None:
        self.y, self.target = y, y
        if accumulate:
            self.how = ACCUMULATE.value
        elif splits == 1 and y.dtype in DTYPES:
            self.how = STORE.value
        elif torch.are_deterministic_algorithms_enabled():
            self.how = PARTIALS.value
            self.target = torch.empty(splits, y.numel(), device=y.device, dtype=torch.float32)
        else:
            self.how = ACCUMULATE.value
            self.target = workspace.accumulator(y.device, y.numel())

    def done(self) -> None:
        """The second launch, where one is needed."""
        if self.target is self.y:
            return
        if self.how == PARTIALS.value:
            add_partials(self.target, self.y)
        else:
            finish(self.target, self.y)


def _width(n: int, segments: tuple[int, ...], widest: int) -> int:
    """The widest strip (a power of two) that no segment boundary crosses."""
    width, at = widest, 0
    for size in segments[:-1]:
        at += size
        while at % width:
            width //= 2
    if width < min(16, widest):
        raise ValueError(f"segment boundaries must be multiples of 16, got sizes {segments}")
    return width


def column(
    x: Tensor,
    wt: Tensor,
    t: Tensor | float | None,
    *,
    y: Tensor,
    up: Tensor | None = None,
    act: str | None = None,
    bias: Tensor | None = None,
    segments: tuple[int, ...] = (),
    accumulate: bool = False,
    zero: Tensor | None = None,
    expected_sparsity: float = 0.5,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """The column kernel for one row; returns y.

    x: [K], contiguous, 16-bit or fp32 (rounded to wt's dtype first). wt: [K, N]. t: fp32, 0-d or [K]; with
    `segments` (sizes of up to three groups of outputs, multiples of 16) [P] or [P, K]; None keeps every channel,
    the number 0 drops exact zeros.
    y: [N]; with `accumulate` fp32, added to in place (one launch, atomics, whatever the determinism setting says).
    zero: fp32 buffer of a later kernel, cleared on the way, which saves that kernel a launch.
    expected_sparsity: chooses the form. tile: (outputs, channels of a load tile, channels of a program), for tuning.
    """
    k, n = wt.shape
    parts = len(segments) if segments else 1
    if parts > 3:
        raise ValueError(f"at most three segments, got {parts}")
    first, second = (sum(segments[: i + 1]) if i + 1 < parts else n + (1 << 16) for i in range(2))
    edges = (first, second)
    test, t = _test(t, k, parts)
    repeatable = not accumulate and torch.are_deterministic_algorithms_enabled()  # fewer splits, fewer partials to add
    packs = test != KEEP_ALL.value and compact.fits(wt, segments)
    if packs and (repeatable or expected_sparsity >= COMPACT_FROM):
        sums = Sums(y, compact.splits(k), accumulate)
        if sums.how != STORE.value:
            compact.launch(
                x, up, t, wt, bias, sums.target, zero, test=test, edges=edges, act=act_code(act),
                partials=sums.how == PARTIALS.value, expected_sparsity=expected_sparsity,
            )  # fmt: skip
            sums.done()
            return y
    bn, bm, ks = tile or _tile(n, expected_sparsity, test, repeatable)
    bn = _width(n, segments, bn)
    strips, splits = cdiv(n, bn), cdiv(k, ks)
    sums = Sums(y, splits, accumulate)
    n_zero = 0 if zero is None else zero.numel()
    masked_kernel[(strips, splits)](
        x, x if up is None else up, x if t is None else t, wt, x if bias is None else bias, sums.target,
        y if zero is None else zero, n, k, ks, n_zero, *edges,
        ACT=act_code(act), HAS_UP=up is not None, TEST=test, HAS_BIAS=bias is not None, HOW=sums.how,
        EVEN_N=n % bn == 0, CLEAR=power_of_two(cdiv(n_zero, strips * splits)) if n_zero else 0, DT=DTYPES[wt.dtype],
        BN=bn, BM=bm, num_warps=1,
    )  # fmt: skip
    sums.done()
    return y


def _tile(n: int, expected_sparsity: float, test: int, repeatable: bool) -> tuple[int, int, int]:
    """(outputs, channels of a load tile, channels of a program): the best on an H100 by bench/gpu_kernels.py --tune."""
    if repeatable:
        return 64, 32, 128
    if test == KEEP_ALL.value:
        return 64, 32, 32
    return (128, 32, 32) if n >= 8192 or expected_sparsity == 0 else (64, 32, 64)


def column_list(
    x: Tensor,
    wt: Tensor,
    idx: Tensor,
    *,
    y: Tensor,
    count: Tensor | None = None,
    by_position: bool = False,
    bias: Tensor | None = None,
    accumulate: bool = False,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """The column kernel over the listed channels; returns y.

    idx: int32 [m]; count: 0-d int32 on the device, how many of idx count (None: all). x: [K], or with `by_position`
    [m], one value for each entry of idx. The rest as in `column`. tile: (outputs, channels of a load tile, splits).
    """
    n, m = wt.shape[1], idx.numel()
    bn, bm, splits = tile or (64, 16, max(1, min(512, cdiv(m, 16))))
    sums = Sums(y, splits, accumulate)
    list_kernel[(cdiv(n, bn), splits)](
        x, idx, idx if count is None else count, wt, x if bias is None else bias, sums.target, m, n, splits,
        BY_POSITION=by_position, DEVICE_COUNT=count is not None, HAS_BIAS=bias is not None, HOW=sums.how,
        EVEN_N=n % bn == 0, DT=DTYPES[wt.dtype], BN=bn, BM=bm, num_warps=1,
    )  # fmt: skip
    sums.done()
    return y


def batch(
    x: Tensor,
    wt: Tensor,
    t: Tensor | float | None,
    *,
    y: Tensor,
    bias: Tensor | None = None,
    accumulate: bool = False,
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """The column kernel for x [B, K], 2 <= B <= 16, contiguous; y: [B, N]. Arguments as in `column`.

    tile: (outputs, channels of a load tile, channels of a program, warps).
    """
    (b, k), n = x.shape, wt.shape[1]
    bn, bm, ks, warps = tile or ((64, 32, 256, 1) if k * n < 1 << 25 else (128, 32, 1024, 4))
    splits = cdiv(k, ks)
    sums = Sums(y, splits, accumulate)
    test, t = _test(t, k)
    batch_kernel[(cdiv(n, bn), splits)](
        x, x if t is None else t, wt, x if bias is None else bias, sums.target, b, n, k, ks,
        TEST=test, HAS_BIAS=bias is not None, HOW=sums.how, DT=DTYPES[wt.dtype], DOT=dot_dtype(wt.dtype), BN=bn, BM=bm,
        num_warps=warps,
    )  # fmt: skip
    sums.done()
    return y


def _sparse_rows(x: Tensor, *weights: Tensor | None) -> int:
    """How many rows x [..., K] has, if kernels can run it by these weights, else 0."""
    fits = all(w is None or (w.is_contiguous() and w.dtype in DTYPES and w.numel() < 1 << 31) for w in weights)
    rows = x.numel() // max(1, x.shape[-1])
    return rows if fits and x.dtype in DTYPES else 0


def fast_path(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a call with this x [..., K] and these weight matrices runs the one-row kernels."""
    return _sparse_rows(x, *weights) == 1


def batch_path(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether column kernels take x [..., K] as a batch of 2 to 16 rows and skip what all of them drop.

    Everything else multiplies zeroed inputs.
    """
    return 2 <= _sparse_rows(x, *weights) <= MAX_ROWS


def column_gemv(
    x: Tensor,
    wt: Tensor,
    t: Tensor | float | None,
    bias: Tensor | None = None,
    expected_sparsity: float = 0.5,
) -> Tensor:
    """As the reference's; t=None keeps all. More than 16 rows multiply densely.

    expected_sparsity: the share of dropped channels only chooses the form.
    """
    y = x.new_empty(*x.shape[:-1], wt.shape[1])
    rows = _sparse_rows(x, wt)
    if not 1 <= rows <= MAX_ROWS:
        by_torch()
        kept = x if t is None else torch.where(x.abs().float() <= t, 0, x)
        return kept @ wt if bias is None else kept @ wt + bias
    if rows == 1:
        flat = x.reshape(-1).contiguous()
        column(flat, wt, t, y=y.view(-1), bias=bias, expected_sparsity=expected_sparsity)
    else:
        batch(x.reshape(-1, x.shape[-1]).contiguous(), wt, t, y=y.view(-1, wt.shape[1]), bias=bias)
    return y


def column_gemv_index(
    x: Tensor, wt: Tensor, idx: Tensor, bias: Tensor | None = None, count: Tensor | None = None
) -> Tensor:
    """As the reference's, with `count`."""
    y = x.new_empty(*x.shape[:-1], wt.shape[1])
    if fast_path(x, wt):
        return column_list(x.reshape(-1).contiguous(), wt, idx, y=y.view(-1), count=count, bias=bias).view_as(y)
    listed = torch.arange(idx.numel(), device=x.device) < (idx.numel() if count is None else count)
    times = torch.zeros(wt.shape[0], dtype=torch.int32, device=x.device).index_add_(0, idx, listed.int())
    return column_gemv(torch.where(times > 0, x, 0), wt, None, bias)


def column_gemv_glu(
    gate: Tensor,
    up: Tensor | None,
    wt: Tensor,
    t: Tensor | float | None,
    act: str,
    bias: Tensor | None = None,
    expected_sparsity: float = 0.5,
) -> Tensor:
    """As the reference's; the product is made inside the kernel for one row."""
    if fast_path(gate, wt):
        y = gate.new_empty(*gate.shape[:-1], wt.shape[1])
        flat = None if up is None else up.reshape(-1).contiguous()
        x = gate.reshape(-1).contiguous()
        column(x, wt, t, y=y.view(-1), up=flat, act=act, bias=bias, expected_sparsity=expected_sparsity)
        return y
    return column_gemv(glu(gate, up, act), wt, t, bias, expected_sparsity)


def glu(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """act(gate) * up, rounded as the kernels do."""
    act_code(act)
    g = gate.float()
    if act == "silu":
        a = torch.nn.functional.silu(g)
    elif act in ("relu", "relu2"):
        a = g.relu()
        a = a * a if act == "relu2" else a
    else:
        a = torch.nn.functional.gelu(g, approximate="tanh" if act == "gelu_tanh" else "none")
    a = a.to(gate.dtype)
    return a if up is None else a * up


def dense_gemv(x: Tensor, wt: Tensor, bias: Tensor | None = None) -> Tensor:
    """As the reference's: the column kernel at 0 %."""
    return column_gemv(x, wt, None, bias)
