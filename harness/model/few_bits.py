"""A copy of a weight in a few bits, for what decides by it: read as few bits where a kernel can."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import lowbit

KERNELS = (4, 8)  # bits that are stored as such


@dataclass(frozen=True, eq=False)
class FewBits:
    """A weight [n, d] as whole multiples, up to 2^(bits - 1) - 1, of a scale a row.

    values: what it stands for, in the weight's dtype. scale: fp32 [n]. codes: the multiples by input channel, for the
    products of one token on a CPU: a channel that is left out is not read there. None where no kernel reads them.
    """

    values: Tensor
    scale: Tensor
    codes: lowbit.Packed | None

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> FewBits:
        """Rounded to the nearest."""
        most = 2 ** (bits - 1) - 1
        scale = weight.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / most
        codes = (weight / scale).round().clamp(-most, most)  # 16-bit quotients may pass it
        stored = lowbit.pack_codes(codes.t().float(), bits) if bits in KERNELS and weight.device.type == "cpu" else None
        return cls(codes * scale, scale[:, 0].float(), stored)

    @classmethod
    def exact(cls, weight: Tensor) -> FewBits:
        """The weight itself, in all of its bits."""
        return cls(weight, torch.ones(len(weight)), None)

    def product(self, x: Tensor, cut: float, bias: Tensor | None = None) -> Tensor:
        """[..., n], of the inputs of x [..., d] with |x_i| > cut; all of them if cut is negative."""
        if self.codes is not None and x.numel() == x.shape[-1] and x.dtype in (torch.float32, torch.bfloat16):
            y = lowbit.columns(x.float(), self.codes, torch.tensor(cut)) * self.scale
            return (y if bias is None else y + bias).to(x.dtype)
        kept = F.hardshrink(x, cut) if cut >= 0 else x
        return F.linear(kept, self.values, bias)
