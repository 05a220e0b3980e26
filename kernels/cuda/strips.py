"""Weights in int4 or int8 for the CUDA kernels: a bf16 scale for each group of a line, lines side by side in strips.

A line is what is skipped as a whole: an input channel's weights (a row of W^T) for column-sparse products, a neuron's
(a row of W) for row-sparse ones; groups run along the line, so that a dropped line's scales are dropped with it. A
strip holds so many outputs of every channel as one block of threads computes; row-wise lines are one strip. Within a
word of 32 bits codes ascend from bit 15 on, round the end: from there a rotation by whole bytes brings each to the
upper mantissa of a float32 (csrc/common.cuh). Strips in int4 are for tensor cores: words of 16 bits, from bit 2 on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LANES = 8  # sixteen bytes each: a strip is 128 bytes of a channel
_BLOCK = 2**24  # weights that are quantised at a time


@dataclass(frozen=True, eq=False)
class Strips:
    """Lines of `width` weights. codes: uint8 [strips, lines, bytes]; scales: bf16 [strips, lines, groups]."""

    codes: Tensor
    scales: Tensor
    bits: int
    group: int
    width: int
    by_rows: bool = False

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
            each = _codes(codes, self.bits, self.by_rows).float() - 2 ** (self.bits - 1)
            whole = scales.float().repeat_interleave(self.group, -1)
            parts.append(each * whole[:, : each.shape[1]])
        return torch.cat(parts, 1)[:, : self.width]


def joined(parts: list[Strips]) -> Strips:
    """Matrices with the same lines side by side; each begins at a strip of its own, so that padding lies between.

    The last ends where its outputs do: there is nothing behind them that a product could be added to.
    """
    first = parts[0]
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    last = parts[-1]
    width = (len(codes) - len(last.codes)) * first.outputs + last.width
    return Strips(codes, scales, first.bits, first.group, width)


def stacked(parts: list[Strips]) -> Strips:
    """Matrices of rows of the same width, one after another."""
    codes, scales = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("codes", "scales"))
    return Strips(codes, scales, parts[0].bits, parts[0].group, parts[0].width, by_rows=True)


def _rotated(words: Tensor, by: int, size: int) -> Tensor:
    """Words of `size` bits, held in int64, rotated left."""
    return ((words << by) | (words >> (size - by))) & (2**size - 1)


def _order(bits: int, by_rows: bool) -> tuple[int, int]:
    """Bits of a word whose codes stand together, and by how many it is rotated."""
    return (32, 15) if bits == 8 or by_rows else (16, 2)


def _words(codes: Tensor, bits: int, by_rows: bool) -> Tensor:
    """Codes [L, outputs], int64, as bytes, uint8 [L, outputs * bits / 8]."""
    size, by = _order(bits, by_rows)
    if size == 16:  # a strip for the tensor cores: lane, word, nibble are output 64 * word + 8 * nibble + lane
        codes = codes.unflatten(1, (-1, 8, 8)).permute(0, 3, 1, 2).flatten(1)
    words = codes.unflatten(1, (-1, size // bits)) << (bits * torch.arange(size // bits, device=codes.device))
    words = _rotated(words.sum(-1), by, size)
    signed = torch.where(words >= 2 ** (size - 1), words - 2**size, words)
    return signed.to(torch.int32 if size == 32 else torch.int16).view(torch.uint8)


def _codes(stored: Tensor, bits: int, by_rows: bool) -> Tensor:
    """What `_words` made, undone: int64 [L, outputs]."""
    size, by = _order(bits, by_rows)
    words = stored.view(torch.int32 if size == 32 else torch.int16).long() & (2**size - 1)
    words = _rotated(words, size - by, size)
    codes = ((words[..., None] >> (bits * torch.arange(size // bits, device=stored.device))) & (2**bits - 1)).flatten(1)
    if size == 16:
        codes = codes.unflatten(1, (8, -1, 8)).permute(0, 2, 3, 1).flatten(1)
    return codes


def pack(lines: Tensor, bits: int, group: int = 128, by_rows: bool = False) -> Strips:
    """Quantise lines [lines, width] of floats; by_rows: for products by row, one strip.

    The value of largest magnitude of a group becomes the lowest code (int8: 127), as in GGML's Q4_0, and each weight is
    rounded to the nearest multiple of the scale as it is stored. Raises ValueError for other than 4 or 8 bits, or a
    group that does not fit.
    """
    per = 128 // bits if bits in (4, 8) else 0
    if not per:
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    width = lines.shape[1]
    outputs = -(-width // per) * per if by_rows else LANES * per
    if group % per or (not by_rows and outputs % group):
        raise ValueError(f"groups of {group} fit neither {per} weights of sixteen bytes nor a strip of {outputs}")
    codes, scales = [], []
    for strip in lines.split(outputs, 1):
        parts = [_encoded(part, bits, group, outputs, by_rows) for part in strip.split(max(1, _BLOCK // outputs))]
        codes.append(torch.cat([code for code, _ in parts]))
        scales.append(torch.cat([scale for _, scale in parts]))
    return Strips(torch.stack(codes), torch.stack(scales), bits, group, width, by_rows)


def pack_codes(codes: Tensor, bits: int) -> Strips:
    """Whole numbers [lines, width] from -2^(bits - 1) to 2^(bits - 1) - 1 by channel, as they are: scales are one.

    Raises ValueError for other than 4 or 8 bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    outputs, half = LANES * 128 // bits, 2 ** (bits - 1)
    whole = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % outputs)) + half
    stored = torch.stack([_words(strip, bits, by_rows=False) for strip in whole.split(outputs, 1)])
    return Strips(stored, codes.new_ones(*stored.shape[:2], 1, dtype=torch.bfloat16), bits, outputs, codes.shape[1])


def _encoded(lines: Tensor, bits: int, group: int, outputs: int, by_rows: bool) -> tuple[Tensor, Tensor]:
    """Lines [L, <= outputs] as bytes, uint8 [L, outputs * bits / 8], and scales, bf16 [L, groups]."""
    padded = -(-outputs // group) * group
    groups = torch.nn.functional.pad(lines.float(), (0, padded - lines.shape[1])).unflatten(1, (-1, group))
    half = 2 ** (bits - 1)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    scales = (largest / -8 if bits == 4 else largest.abs() / 127).bfloat16()
    each = scales.float()[..., None]
    codes = torch.where(each == 0, 0.0, groups / each).round().clamp(-half, half - 1).long() + half
    return _words(codes.flatten(1)[:, :outputs], bits, by_rows), scales
