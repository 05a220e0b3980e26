"""A copy of a weight in a few bits, for what decides by it: read as few bits where a kernel can."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import few_bits, lowbit

KERNELS = (4, 8)  # bits that are stored as such
# By class, which no trained threshold or shift can hide behind: what kernels call it.
ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


@dataclass(frozen=True, eq=False)
class FewBits:
    """A weight [n, d] as whole multiples, up to 2^(bits - 1) - 1, of a scale a row.

    values: what it stands for, in the weight's dtype, for the products of many tokens. scale: fp32 [n]. codes: the
    multiples by input channel, for the products of one token: a channel that is left out is not read there. None where
    no kernel reads them.
    """

    values: Tensor
    scale: Tensor
    codes: lowbit.Packed | few_bits.Channels | None

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> FewBits:
        """Rounded to the nearest."""
        most = 2 ** (bits - 1) - 1
        scale = weight.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / most
        codes = (weight / scale).round().clamp(-most, most)  # 16-bit quotients may pass it
        stored: lowbit.Packed | few_bits.Channels | None = None
        if bits in KERNELS and weight.is_cpu:
            stored = lowbit.pack_codes(codes.t().float(), bits)
        elif bits in KERNELS and weight.is_cuda and few_bits.available():
            stored = few_bits.pack(codes, scale[:, 0], bits)
        return cls(codes * scale, scale[:, 0].float(), stored)

    @classmethod
    def exact(cls, weight: Tensor) -> FewBits:
        """The weight itself, in all of its bits."""
        return cls(weight, torch.ones(len(weight)), None)

    def product(self, x: Tensor, cut: float, bias: Tensor | None = None) -> Tensor:
        """[..., n], of the inputs of x [..., d] with |x_i| > cut; all of them if cut is negative."""
        if isinstance(self.codes, few_bits.Channels):
            if few_bits.fits(x, self.codes):
                return few_bits.product(x, self.codes, cut, bias)
        elif self.codes is not None and x.numel() == x.shape[-1] and x.dtype in (torch.float32, torch.bfloat16):
            y = lowbit.columns(x.float(), self.codes, torch.tensor(cut)) * self.scale
            return (y if bias is None else y + bias).to(x.dtype)
        kept = F.hardshrink(x, cut) if cut >= 0 else x
        return F.linear(kept, self.values, bias)


@dataclass(frozen=True, eq=False)
class Copy:
    """Gate (None in a plain MLP) and up of a layer in few bits, to guess by which neurons matter.

    cut: what an input's magnitude must exceed to be read. Biases: of the layer itself.
    """

    gate: FewBits | None
    up: FewBits
    act: nn.Module
    cut: float
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None

    def score(self, x: Tensor) -> Tensor:
        """|up x * act(gate x)| [..., neurons] from the inputs x [..., d_model] above the cut."""
        return magnitudes(x, self.gate, self.up, self.act, self.cut, self.gate_bias, self.up_bias)


def magnitudes(
    x: Tensor,
    gate: FewBits | None,
    up: FewBits,
    act: nn.Module,
    cut: float,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """|up x * act(gate x)| [..., n], |act(up x)| without gate, of the inputs of x [..., d] with |x_i| > cut.

    One token on a GPU reads both copies in the same launches, which end with the activation where kernels know it.
    """
    ours, theirs = _channels(up), _channels(gate)
    if ours is not None and (gate is None or theirs is not None) and few_bits.fits(x, theirs, ours):
        if (name := ACTIVATIONS.get(type(act).__name__)) is not None:
            return few_bits.magnitudes(x, theirs, ours, cut, name, gate_bias, up_bias)
        if theirs is not None:
            gates, ups = few_bits.products(x, theirs, ours, cut, gate_bias, up_bias)
            return (act(gates) * ups).abs()
    ups = up.product(x, cut, up_bias)
    if gate is None:
        return act(ups).abs()
    return (act(gate.product(x, cut, gate_bias)) * ups).abs_()


def _channels(weight: FewBits | None) -> few_bits.Channels | None:
    """Its codes as a GPU reads them."""
    return weight.codes if weight is not None and isinstance(weight.codes, few_bits.Channels) else None
