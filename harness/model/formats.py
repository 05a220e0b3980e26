"""Weights of int8 or int4, a scale for every group of inputs: the module holds what the codes stand for.

The decoder blocks' projections are quantised, embeddings, norms and the head are not. Each weight is rounded to the
nearest multiple of its group's scale, in fp16: of int8 the largest magnitude is 127 of them, of int4 the weight of
largest magnitude is -8 of them. With groups of 32 these are llama.cpp's Q8_0 and Q4_0, value for value, and the rule is
that of `kernels.lowbit`. (A symmetric int4 range, torchao's default, costs more: SmolLM2-135M's perplexity of 22.4
becomes 31.4, here 27.9.)

The modules keep a plain weight with these values in their own dtype, so that masked execution, fits that read columns,
norms or singular vectors, and the KV policies all are of the quantised model. What is stored is told apart from what is
held: the ledger counts the bytes of codes and scales. Light: a config is checked before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BITS = {"int8": 8, "int4": 4}
GROUPS = (32, 64, 128)
SCALE_BYTES = 2  # fp16


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
        groups = weight.reshape(-1, self.group).float()
        if self.bits == 4:
            scales = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
        else:
            scales = groups.abs().amax(-1, keepdim=True) / 127
        half = 2 ** (self.bits - 1)
        codes = (groups / scales.where(scales != 0, 1)).round().clamp(-half, half - 1)
        values = codes * scales.half().float()
        return values.view(weight.shape).to(weight.dtype)
