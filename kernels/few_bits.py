"""Whole numbers of 4 or 8 bits by input channel, a scale for each output: what a choice is made from on a GPU.

The numbers of one channel lie side by side, so that a channel which is left out is not read. There is one scale for an
output, applied to its finished sum; formats with scales for groups of weights are `kernels.lowbit` and
`kernels.cuda.strips`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import cuda_function

WORDS = 16  # that a channel's numbers are padded to: what the kernel reads of it at once


@dataclass(frozen=True, eq=False)
class Channels:
    """A weight [n, d] as code * scale. codes: int32 [d, words]; scale: fp32 [n]; bits: 4 or 8.

    Code j of word w, the lowest first, counts from -2^(bits - 1) and is of output j * words + w. So outputs that a
    kernel adds up side by side lie side by side, however it cuts them up.
    """

    codes: Tensor
    scale: Tensor
    bits: int

    def values(self) -> Tensor:
        """The weight that the codes stand for, fp32 [n, d]."""
        least, mask = 2 ** (self.bits - 1), 2**self.bits - 1
        whole = torch.cat([(self.codes >> at) & mask for at in range(0, 32, self.bits)], 1) - least
        return whole[:, : len(self.scale)].t() * self.scale[:, None]


def pack(codes: Tensor, scale: Tensor, bits: int) -> Channels:
    """Integers codes [n, d] from -2^(bits - 1) to 2^(bits - 1) - 1, of any dtype, and scale [n], where codes lie.

    Raises ValueError for other than 4 or 8 bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"weights have 4 or 8 bits, not {bits}")
    of_word = 32 // bits
    whole = torch.nn.functional.pad(codes.t().to(torch.int32), (0, -len(codes) % (WORDS * of_word))) + 2 ** (bits - 1)
    words = torch.zeros_like(whole[:, : whole.shape[1] // of_word])
    for j, part in enumerate(whole.chunk(of_word, 1)):
        words |= part << (bits * j)
    return Channels(words.contiguous(), scale.float().contiguous(), bits)


def available() -> bool:
    """Whether there is a kernel that reads these: Triton can be loaded."""
    return cuda_function("few_bits_product") is not None


def fits(x: Tensor, *weights: Channels | None) -> bool:
    """Whether a kernel takes x [..., d] by these weights: one token in 16 or 32 bits, and the weights where it lies."""
    fit = cuda_function("few_bits_fits")
    return fit is not None and fit(x, *weights)


def product(x: Tensor, weight: Channels, cut: float, bias: Tensor | None = None) -> Tensor:
    """Weight times the inputs of x [..., d], one token, with |x_i| > cut: [..., n], in x's dtype. x must fit.

    As in torch's hardshrink, the cut is rounded to x's dtype first.
    """
    return _kernel(x, None, weight, cut, None, None, bias)[0]


def products(
    x: Tensor,
    gate: Channels,
    up: Channels,
    cut: float,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`product` by two weights of one shape in the same launches: two of [..., n]."""
    found = _kernel(x, gate, up, cut, None, gate_bias, up_bias)
    return found[0], found[1]


def magnitudes(
    x: Tensor,
    gate: Channels | None,
    up: Channels,
    cut: float,
    act: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """|up x * act(gate x)|, |act(up x)| without gate, rounded step by step as a module does: [..., n].

    act: a name in `kernels.cuda.common.ACTIVATIONS`. The rest as in `products`.
    """
    return _kernel(x, gate, up, cut, act, gate_bias, up_bias)[0]


def _kernel(
    x: Tensor,
    gate: Channels | None,
    up: Channels,
    cut: float,
    act: str | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
) -> Tensor:
    """[1 or 2, ..., n]: what the kernel writes."""
    kernel = cuda_function("few_bits_product")
    assert kernel is not None, "its callers asked `fits`"
    return kernel(x, gate, up, cut, act, gate_bias, up_bias)
