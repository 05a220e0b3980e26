"""Weights of int8 or int4, a scale for every group of inputs: the module holds what the codes stand for.

The decoder blocks' projections are quantised, embeddings, norms and the head are not. Symmetric, rounded to the
nearest by torch's own operator, from the weights in bfloat16. Range and bfloat16 scales are those of torchao's
`IntxWeightOnlyConfig`, which finds the codes in bfloat16, though, and misses the nearest by one for 18 % of int8 codes
and 1 % of int4. The modules keep a plain weight with these values in their own dtype, so that masked execution, fits
that read columns, norms or singular vectors, and the KV policies all are of the quantised model. What is stored is told
apart from what is held: the ledger counts the bytes of codes and scales. Light: a config is checked before torch is
loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BITS = {"int8": 8, "int4": 4}
GROUPS = (32, 64, 128)
SCALE_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class Format:
    """bits of a code, and how many inputs of an output share a scale."""

    bits: int
    group: int

    @property
    def name(self) -> str:
        """As rows and tables name it: int4-g32."""
        return f"int{self.bits}-g{self.group}"

    def bytes(self, weights: float, scales: float) -> float:
        """Of so many codes, and scales."""
        return weights * self.bits / 8 + scales * SCALE_BYTES

    def values(self, weight: Tensor) -> Tensor:
        """What the codes of weight [out, in] stand for, in its dtype. `in` is a multiple of the group."""
        import torch

        half = 2 ** (self.bits - 1)
        groups = weight.bfloat16().reshape(-1, self.group).float()
        scales = (groups.abs().amax(-1) / (half - 0.5)).bfloat16().float()
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
        zeros = torch.zeros_like(scales, dtype=torch.int32)
        values = torch.fake_quantize_per_channel_affine(groups, scales, zeros, 0, -half, half - 1)
        return values.view(weight.shape).to(weight.dtype)
