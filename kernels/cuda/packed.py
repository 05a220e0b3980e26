"""Products of one row with 16-bit, int8 and int4 weights that read only the lines kept (csrc/columns.cu, rows.cu).

`columns` skips input channels: a warp packs the channels that it keeps, then reads their weights. `rows` computes the
listed rows or neurons. Both can be launched early (kernels/cuda/nvrtc.py). Without thresholds or a list they are the
tuned dense products of the same formats; what they read then does not depend on the kernel before, so that early
launches hide more of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.cuda import nvrtc
from kernels.cuda.common import act_code, cdiv
from kernels.cuda.strips import LANES, Strips

KEEP_ALL, NOT_ZERO, SCALAR, PER_CHANNEL, LISTED = range(5)


class Tile(NamedTuple):
    """How a column product is cut: channels of a warp, warps of a block, loads in flight a lane, blocks resident."""

    channels: int = 32
    warps: int = 8
    unroll: int = 8
    blocks: int = 2
    along: bool = False  # blocks that start together share outputs, not channels


class RowTile(NamedTuple):
    """How a row product is cut: rows of a warp, warps of a block, chunks in flight, blocks resident."""

    rows: int = 1
    warps: int = 8
    unroll: int = 4
    blocks: int = 2


def _test(t: Tensor | float | None, channels: int, parts: int) -> int:
    if t is None:
        return KEEP_ALL
    if not isinstance(t, Tensor):
        return NOT_ZERO
    return SCALAR if t.numel() == parts else PER_CHANNEL


def columns(
    x: Tensor,
    w: Tensor | Strips,
    t: Tensor | float | None = None,
    *,
    y: Tensor,
    up: Tensor | None = None,
    act: str | None = None,
    idx: Tensor | None = None,
    count: Tensor | None = None,
    by_position: bool = False,
    bias: Tensor | None = None,
    segments: tuple[int, ...] = (),
    zero: Tensor | None = None,
    partials: bool = False,
    early: int = 0,
    half: torch.dtype = torch.bfloat16,
    tile: Tile | None = None,
) -> Tensor:
    """Add the product of x [K] with the kept channels to y, fp32 [N]; returns y.

    x: 16-bit or fp32, then rounded to w's dtype or, for low-bit weights, to `half`. w: W^T [K, N] or its strips.
    t, up, act, segments, zero: as in `column.column`; segments are whole strips.
    idx: int32 [m], the channels that take part, count of them (0-d int32) or all; by_position: x[j] belongs to idx[j].
    bias: 16-bit [N], added too. With `early` idx and bias must be older than the kernel before this one.
    partials: y is fp32 [splits, N] and written.
    early: 0, or when the next kernel may start: 1, once this one no longer waits, 2, once its loads are made.
    """
    n, k = (w.width, w.lines) if isinstance(w, Strips) else (w.shape[1], w.shape[0])
    tile = tile or default_tile(w, t is not None or idx is not None)
    parts = max(1, len(segments))
    edges = [sum(segments[: i + 1]) if i + 1 < parts else 1 << 30 for i in range(2)]
    bits = w.bits if isinstance(w, Strips) else 16
    lanes = LANES if isinstance(w, Strips) else _lanes(LANES, segments)
    test = LISTED if idx is not None else _test(t, k, parts)
    half = w.dtype if isinstance(w, Tensor) else half
    outputs = lanes * (128 // bits)
    if any(sum(segments[: i + 1]) % outputs for i in range(parts - 1)):
        raise ValueError(f"segments {segments} are no whole strips of {outputs} outputs")
    macros = {
        "BITS": bits, "BF16": half == torch.bfloat16, "X32": x.dtype == torch.float32, "ACT": act_code(act),
        "HAS_UP": up is not None, "TEST": test, "LANES": lanes, "CHANNELS": tile.channels, "WARPS": tile.warps,
        "BLOCKS": tile.blocks, "UNROLL": min(tile.unroll, tile.channels * lanes // 32),
        "GROUP": w.group if isinstance(w, Strips) else 0, "BY_POSITION": by_position, "ALONG": tile.along,
        "PDL": early, "PARTIALS": partials, "BIAS": bias is not None,
    }  # fmt: skip
    m = k if idx is None else idx.numel()
    grid = cdiv(n, outputs), cdiv(m, tile.channels * tile.warps)
    grid = grid[::-1] if tile.along else grid
    nvrtc.launch(
        nvrtc.kernel(x.device.index or 0, "columns", **macros), grid, 32 * tile.warps,
        [
            x, up, t if isinstance(t, Tensor) else None, idx, count,
            w.codes if isinstance(w, Strips) else w, w.scales if isinstance(w, Strips) else None, bias, y, zero,
            0 if zero is None else zero.numel(), n, k, m, *edges,
        ],
        early=early > 0,
    )  # fmt: skip
    return y


def _lanes(widest: int, segments: tuple[int, ...]) -> int:
    """Lanes that read a channel of 16-bit weights: the most whose outputs no segment boundary divides."""
    for i in range(len(segments) - 1):
        while widest > 1 and sum(segments[: i + 1]) % (8 * widest):
            widest //= 2
    return widest


def default_tile(w: Tensor | Strips, sparse: bool) -> Tile:
    """By bench/gpu_lowbit.py on an H100."""
    if not isinstance(w, Strips):
        return Tile(32, 4, 8, 5) if sparse else Tile(32, 8, 8, 2)
    if w.bits == 8:
        return Tile(64, 4, 16, 4)
    if w.lines * w.width < 1 << 25:
        return Tile(32, 8, 8, 2)
    return Tile(128, 4, 8, 4) if sparse else Tile(64, 4, 8, 4)


def splits(w: Tensor | Strips, sparse: bool) -> int:
    """Rows of the partial sums of `columns`, as it is tuned."""
    tile = default_tile(w, sparse)
    return cdiv(w.lines if isinstance(w, Strips) else w.shape[0], tile.channels * tile.warps)


def rows(
    x: Tensor,
    w: Tensor | Strips,
    *,
    y: Tensor,
    w_up: Tensor | Strips | None = None,
    act: str | None = None,
    idx: Tensor | None = None,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    add: bool = False,
    fresh: bool = False,
    early: int = 0,
    half: torch.dtype = torch.bfloat16,
    tile: RowTile | None = None,
) -> Tensor:
    """Write x . w[row] to y (add: to fp32 y at row), or act(x . w[row]) * (x . w_up[row]) with `w_up`; returns y.

    x: [K], 16-bit or fp32; w, w_up: [rows, K] or one strip of rows. y: 16-bit or fp32 [rows]; with idx (int32 [m]) and
    w_up y[j] belongs to idx[j]. fresh: the list is made by the kernel before this one. bias, with w_up also up_bias:
    16-bit [rows], added before anything is rounded. The rest as in `columns`. Raises ValueError if only one of gate and
    up has a bias.
    """
    if (up_bias is None) != (bias is None or w_up is None):
        raise ValueError("gate and up have a bias each, or none")
    low = isinstance(w, Strips)
    n, k = (w.lines, w.width) if isinstance(w, Strips) else w.shape
    bits = w.bits if isinstance(w, Strips) else 16
    tile = tile or (RowTile(1, 8, 4, 2) if w_up is not None else RowTile(2, 8, 4, 2))
    half = w.dtype if isinstance(w, Tensor) else half
    per = 128 // bits
    macros = {
        "BITS": bits, "BF16": half == torch.bfloat16, "X32": x.dtype == torch.float32, "ACT": act_code(act),
        "HAS_UP": 0, "GLU": w_up is not None, "LISTED": idx is not None, "ROWS": tile.rows, "WARPS": tile.warps,
        "BLOCKS": tile.blocks, "UNROLL": tile.unroll, "GROUP": w.group if isinstance(w, Strips) else 0,
        "BY_POSITION": idx is not None and w_up is not None, "PDL": early,
        "WIDE": y.dtype == torch.float32, "ADD": add, "BIAS": bias is not None, "FRESH": fresh,
    }  # fmt: skip
    chunks = cdiv(k, 32 * per)
    floats = chunks * 32 * per + (chunks * 32 * (2 if bits == 4 else 1) if low else 0)
    m = n if idx is None else idx.numel()
    other = w if w_up is None else w_up
    blocks = min(cdiv(m, tile.rows * tile.warps), nvrtc.processors(x.device) * tile.blocks)
    nvrtc.launch(
        nvrtc.kernel(x.device.index or 0, "rows", **macros), (blocks, 1), 32 * tile.warps,
        [
            x, idx, count, w.codes if isinstance(w, Strips) else w,
            w.scales if isinstance(w, Strips) else None, other.codes if isinstance(other, Strips) else other,
            other.scales if isinstance(other, Strips) else None, bias, up_bias, y, m, k,
            w.codes.shape[2] // 16 if isinstance(w, Strips) else k // 8,
        ],
        shared=4 * floats, early=early > 0,
    )  # fmt: skip
    return y
