"""Weights in int4 or int8, a scale for every 32 of a line, laid out so that a dropped line's bytes are not read.

A line is what is skipped as a whole: an input channel's weights (a row of W^T) for column-sparse products, a neuron's
(a row of W) for row-sparse ones. Its codes and its scales lie side by side: 64-byte chunks of 32 16-bit words, each
word holding 4 codes of 4 bits or 2 of 8, then the scales; lines are padded to whole cache lines. The order of codes
within a chunk is made for 16-bit dot products over two lines interleaved word by word (kernels/cpu/csrc/kernels.h).

A weight is code * scale * peak / 2^15: the scale a signed 16-bit integer of its own, the peak one fp32 number for each
group position of all lines. So scale times activation is one 16-bit multiplication, whose result goes into the dot
product. Kernels round activations to 16 bits of the largest one that takes part: `unit` below. A product of a small
activation and a small scale is left few bits by that, so where a few activations are far larger than the rest, as in
the second layer of many models, they and the others are summed apart, each with a unit of their own (`outliers`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.cpu.build import load_extension

GROUP = 32  # weights that share a scale
_LINE = 64  # bytes of a cache line, and of a chunk
_ONE = 2**15
_BLOCK = 2**22  # weights that are quantised at a time


@dataclass(frozen=True, eq=False)
class Packed:
    """Lines of `width` weights. codes: uint8 [panels, lines, stride]; peaks: fp32 [panels, groups]; bits: 4 or 8.

    panels > 1: a matrix with many outputs, of which each panel holds `width` (the head, always dense).
    """

    codes: Tensor
    peaks: Tensor
    bits: int
    width: int

    @property
    def lines(self) -> int:
        """Lines of a panel."""
        return self.codes.shape[1]

    @property
    def line_bytes(self) -> int:
        """Bytes that a kernel reads of a line, padding included."""
        return self.codes.shape[2]

    def values(self) -> Tensor:
        """The weights that the codes stand for, fp32 [lines, panels * width]."""
        codes, scales = unpacked(self)
        each = scales * self.peaks[:, None] / _ONE
        weights = codes.unflatten(-1, (-1, GROUP)) * each[..., None]
        return weights.flatten(-2)[..., : self.width].transpose(0, 1).flatten(1)


@cache
def _order(bits: int) -> Tensor:
    """By (word, code in it) of a chunk the place of the weight among the chunk's: int64 [32, 16 / bits]."""
    d = torch.arange(16)
    order = torch.empty(32, 16 // bits, dtype=torch.long)
    for j in range(16 // bits):
        for h in range(2):
            order[8 * (d // 4) + 4 * h + d % 4, j] = 32 * j + 16 * h + d
    return order


def pack(weight: Tensor, bits: int, panel: int | None = None) -> Packed:
    """Quantise lines [lines, width] of floats; panel: outputs of a panel, which divides width (None: one panel).

    The value of largest magnitude of a group becomes the lowest code, as in GGML's Q4_0 (int8: 127), and each weight
    is rounded to the nearest multiple of the scale as it is stored. Raises ValueError for other than 4 or 8 bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    width = weight.shape[1] if panel is None else panel
    panels = weight.unflatten(1, (-1, width)).transpose(0, 1)  # [panels, lines, width]
    peaks = torch.stack([_wanted(_grouped(one, bits), bits).abs().amax(0) for one in panels]) * (_ONE / (_ONE - 1))
    at_once = max(1, _BLOCK // width)
    lines = [
        torch.cat([_encoded(block, peak, bits, align=panel is None) for block in one.split(at_once)])
        for one, peak in zip(panels, peaks, strict=True)
    ]
    return Packed(torch.stack(lines), peaks.contiguous(), bits, width)


def pack_codes(codes: Tensor, bits: int) -> Packed:
    """Integers [lines, width] from -2^(bits - 1) to 2^(bits - 1) - 1, as they are: every scale is one."""
    if bits not in (4, 8):
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    groups = _grouped(codes, bits)
    most = torch.full(groups.shape[:-1], _ONE - 1, dtype=torch.int16)
    peaks = torch.full((1, groups.shape[1]), _ONE / (_ONE - 1))
    return Packed(_stored(groups.int(), most, bits, align=True)[None].contiguous(), peaks, bits, codes.shape[1])


def _grouped(lines: Tensor, bits: int) -> Tensor:
    """Lines [L, width] as fp32 [L, groups, 32], zeros behind the last weight."""
    lines = torch.nn.functional.pad(lines.float(), (0, -lines.shape[-1] % (8 * _LINE // bits)))
    return lines.unflatten(-1, (-1, GROUP))


def _wanted(groups: Tensor, bits: int) -> Tensor:
    """The scale that each group would like, [L, groups]."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    return largest / -8 if bits == 4 else largest.abs() / 127


def _encoded(lines: Tensor, peak: Tensor, bits: int, align: bool) -> Tensor:
    """Lines [L, width] as bytes, uint8 [L, stride]. align: pad them to whole cache lines."""
    groups, half = _grouped(lines, bits), 2 ** (bits - 1)
    floor = torch.finfo(torch.float32).tiny
    scales = (_wanted(groups, bits) / peak.clamp(min=floor) * _ONE).round().short()
    each = (scales.float() * peak / _ONE)[..., None]
    codes = torch.where(each == 0, 0.0, groups / each).round().clamp(-half, half - 1).int()
    return _stored(codes, scales, bits, align)


def _stored(codes: Tensor, scales: Tensor, bits: int, align: bool) -> Tensor:
    """Codes int32 [L, groups, 32] and scales int16 [L, groups] as bytes, uint8 [L, stride]."""
    codes = codes + 2 ** (bits - 1)
    words = codes.flatten(-2).unflatten(-1, (-1, 8 * _LINE // bits))[..., _order(bits)]  # [L, chunks, 32, of a word]
    whole = (words << (bits * torch.arange(16 // bits, dtype=torch.int32))).sum(-1, dtype=torch.int32)
    body = torch.where(whole >= _ONE, whole - 2 * _ONE, whole).short().view(torch.uint8).flatten(1)
    line = torch.cat([body, scales.view(torch.uint8)], -1)
    return torch.nn.functional.pad(line, (0, -line.shape[-1] % _LINE)) if align else line


def unpacked(packed: Packed) -> tuple[Tensor, Tensor]:
    """Codes fp32 [panels, lines, padded width] without their offset, and scales fp32 [panels, lines, groups]."""
    bits, groups = packed.bits, packed.peaks.shape[1]
    at = groups * GROUP * bits // 8
    chunks = packed.codes[..., :at].unflatten(-1, (-1, _LINE))
    codes = torch.stack([chunks & 15, chunks >> 4], -1).flatten(-2) if bits == 4 else chunks  # of a word, lowest first
    codes = codes[..., _order(bits).flatten().argsort()]
    scales = packed.codes[..., at : at + 2 * groups].contiguous().view(torch.int16)
    return codes.flatten(-2).float() - 2 ** (bits - 1), scales.float()


def columns(x: Tensor, packed: Packed, t: Tensor | None = None, idx: Tensor | None = None) -> Tensor:
    """x @ lines over the channels with |x_i| > t_i, or those in idx, or all: the tuned dense product of this format.

    x: [..., lines], one row. t: fp32, 0-d or [lines]. idx: integer [m], unique. Returns [..., panels * width].
    """
    if not _on_cpu(x):
        return reference_columns(x, packed, t, idx)
    return torch.ops.dynact_cpu.packed_columns(x, packed.codes, packed.peaks, packed.bits, packed.width, t, idx)


def rows(x: Tensor, packed: Packed, idx: Tensor | None = None) -> Tensor:
    """Dot products of x [..., width], one row, with the lines in idx (the others give 0), or with all. [..., lines]."""
    if not _on_cpu(x):
        return reference_rows(x, packed, idx)
    return torch.ops.dynact_cpu.packed_rows(x, packed.codes, packed.peaks, packed.bits, packed.width, idx)


def reference_columns(x: Tensor, packed: Packed, t: Tensor | None = None, idx: Tensor | None = None) -> Tensor:
    """`columns` in plain torch, integer for integer."""
    v = x.flatten().float()
    keep = torch.ones_like(v, dtype=torch.bool) if t is None else ~(v.abs() <= t)
    if idx is not None:
        keep = torch.zeros_like(keep).index_fill(0, idx.long(), True)
    v = torch.where(keep, v, 0.0)
    far = outliers(v, int(keep.sum()))
    codes, scales = unpacked(packed)
    y = packed.peaks.new_zeros(*packed.peaks.shape, GROUP, dtype=torch.float64)
    for part in (torch.where(far, v, 0.0), torch.where(far, 0.0, v)):
        small, unit = _narrow(part)
        products = ((small[:, None].long() * scales.long() + _ONE // 2) >> 15).double()  # [P, L, groups], 16-bit
        sums = torch.einsum("plg,plgi->pgi", products, codes.unflatten(-1, (-1, GROUP)).double())
        y += sums * (unit.double() * packed.peaks.double())[..., None]
    return y.flatten(1)[:, : packed.width].reshape(*x.shape[:-1], -1).to(x.dtype)


def reference_rows(x: Tensor, packed: Packed, idx: Tensor | None = None) -> Tensor:
    """`rows` in plain torch, integer for integer but for the fp32 sum over groups."""
    codes, scales = unpacked(packed)
    v = torch.nn.functional.pad(x.flatten().float(), (0, codes.shape[-1] - packed.width))
    small, unit = _narrow(v * packed.peaks[0].repeat_interleave(GROUP))
    dots = (codes[0].double() * small.double()).unflatten(-1, (-1, GROUP)).sum(-1)  # [L, groups]
    y = (dots * scales[0].double()).sum(-1) * unit.double() / _ONE
    if idx is not None:
        y = torch.where(torch.zeros_like(y, dtype=torch.bool).index_fill(0, idx.long(), True), y, 0.0)
    return y.reshape(*x.shape[:-1], -1).to(x.dtype)


def outliers(v: Tensor, m: int) -> Tensor:
    """Which of v [lines], m of which take part, are summed apart: those above a 16th of the largest, if few; bool."""
    far = v.abs() > v.abs().max() / 16
    return far if 16 * int(far.sum()) <= m else torch.zeros_like(far)


def _narrow(v: Tensor) -> tuple[Tensor, Tensor]:
    """v as integers of 16 bits, and the unit that they count."""
    unit = v.abs().max() / (_ONE - 1)
    return (v * torch.where(unit > 0, 1 / unit, 0.0)).round(), unit


def _on_cpu(x: Tensor) -> bool:
    one = x.is_cpu and x.numel() == x.shape[-1] and x.dtype in (torch.float32, torch.bfloat16)
    return one and load_extension()
