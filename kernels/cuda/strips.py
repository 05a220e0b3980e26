"""Weights in int4 or int8 for the CUDA kernels: a bf16 scale for each group of a line, lines side by side in strips.

A line is what is skipped as a whole: an input channel's weights (a row of W^T) for column-sparse products, a neuron's
(a row of W) for row-sparse ones; groups run along the line, so that a dropped line's scales are dropped with it. A
strip holds so many outputs of every channel as one block of threads computes; row-wise lines are one strip. Within a
32-bit word codes ascend from bit 15 on, round the end: from there a rotation by whole bytes brings each to the upper
mantissa of a float32 (csrc/common.cuh).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 8  # sixteen bytes each: a strip is 128 bytes of a channel
_SHIFT = 15
_BLOCK = 2**24  # weights that are quantised at a time


@dataclass(frozen=True, eq=False)
class Strips:
    """Lines of `width` weights. codes: uint8 [strips, lines, bytes]; scales: bf16 [strips, lines, groups]."""

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    width: int

    @property
    def lines(self) -> int:
        """Channels or rows."""
        return self.codes.shape[1]

    @property
    def outputs(self) -> int:
        """Weights of a strip's line, padding included."""
        return self.codes.shape[2] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        """Codes, scales and padding."""
        return self.codes.nbytes + self.scales.nbytes

    def values(self) -> Tensor:
        """The weights that the codes stand for, fp32 [lines, width]."""
        parts = []
        for codes, scales in zip(self.codes, self.scales, strict=True):
            shifts = self.bits * torch.arange(32 // self.bits, device=codes.device)
            words = _rotated(codes.view(torch.int32).long() & 0xFFFFFFFF, 32 - _SHIFT)
            each = ((words[..., None] >> shifts) & (2**self.bits - 1)).flatten(-2).float() - 2 ** (self.bits - 1)
            whole = scales.float().repeat_interleave(self.group, -1)
            parts.append(each * whole[:, : each.shape[1]])
        return torch.cat(parts, 1)[:, : self.width]


def joined(parts: list[Strips]) -> Strips:
    """Matrices with the same lines side by side; each begins at a strip of its own, so that padding lies between."""
    first = parts[0]
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return Strips(codes, scales, first.bits, first.group, len(codes) * first.outputs)


def stacked(parts: list[Strips]) -> Strips:
    """Matrices of rows of the same width, one after another."""
    codes, scales = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("codes", "scales"))
    return Strips(codes, scales, parts[0].bits, parts[0].group, parts[0].width)


def _rotated(words: Tensor, by: int) -> Tensor:
    """32-bit words, held in int64, rotated left."""
    return ((words << by) | (words >> (32 - by))) & 0xFFFFFFFF


def pack(lines: Tensor, bits: int, group: int = 128, lanes: int | None = LANES) -> Strips:
    """Quantise lines [lines, width] of floats; lanes: of a strip, sixteen bytes each (None: one strip, for rows).

    The value of largest magnitude of a group becomes the lowest code (int8: 127), as in GGML's Q4_0, and each weight is
    rounded to the nearest multiple of the scale as it is stored. Raises ValueError for other than 4 or 8 bits, or a
    group that does not fit.
    """
    per = 128 // bits if bits in (4, 8) else 0
    if not per:
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    width = lines.shape[1]
    outputs = -(-width // per) * per if lanes is None else lanes * per
    if group % per or (lanes is not None and outputs % group):
        raise ValueError(f"groups of {group} fit neither {per} weights of sixteen bytes nor a strip of {outputs}")
    codes, scales = [], []
    for strip in lines.split(outputs, 1):
        parts = [_encoded(part, bits, group, outputs) for part in strip.split(max(1, _BLOCK // outputs))]
        codes.append(torch.cat([code for code, _ in parts]))
        scales.append(torch.cat([scale for _, scale in parts]))
    return Strips(torch.stack(codes), torch.stack(scales), bits, group, width)


def _encoded(lines: Tensor, bits: int, group: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Lines [L, <= outputs] as bytes, uint8 [L, outputs * bits / 8], and scales, bf16 [L, groups]."""
    padded = -(-outputs // group) * group
    groups = torch.nn.functional.pad(lines.float(), (0, padded - lines.shape[1])).unflatten(1, (-1, group))
    half = 2 ** (bits - 1)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    scales = (largest / -8 if bits == 4 else largest.abs() / 127).bfloat16()
    each = scales.float()[..., None]
    codes = torch.where(each == 0, 0.0, groups / each).round().clamp(-half, half - 1).long() + half
    words = codes.flatten(1)[:, :outputs].unflatten(1, (-1, 32 // bits))
    words = (words << (bits * torch.arange(32 // bits, device=lines.device))).sum(-1)
    words = _rotated(words, _SHIFT)
    return torch.where(words >= 2**31, words - 2**32, words).int().view(torch.uint8), scales
