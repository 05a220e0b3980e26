"""The trained part: low-rank updates and row scales, merged into the weights at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from harness.training.llama import LINEARS, Model


def merge(base: Tensor, scale: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Return base * (1 + scale) + factor * b @ a.

    base: [..., out, in]; scale: [..., out]; a: [..., rank, in]; b: [..., out, rank].
    """
    return base * (1 + scale)[..., None] + factor * (b @ a)


class Adapter(nn.Module):
    """Low-rank factors `a` (random) and `b` (zero) and a row scale (zero) for each linear, stacked over layers.

    The update is differentiated through its merged form: a training step costs what a dense one costs, and
    what is trained is what ships. The row scale carries what low rank cannot: one gain per output channel.
    """

    def __init__(self, model: Model, rank: int, factor: float, seed: int) -> None:
        super().__init__()
        self.factor = factor
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b, self.scale = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name in LINEARS:
            layers, out, width = model.linears[name].shape
            a = torch.randn(layers, rank, width, generator=generator) / math.sqrt(width)
            self.a[name] = nn.Parameter(a)
            self.b[name] = nn.Parameter(torch.zeros(layers, out, rank))
            self.scale[name] = nn.Parameter(torch.zeros(layers, out))

    def forward(self, base: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The merged weights in `dtype`, differentiable in the factors and scales; `base` is fp32."""
        return {
            name: merge(base[name], self.scale[name], self.a[name], self.b[name], self.factor).to(dtype)
            for name in LINEARS
        }


def cut(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The same tensors with each b @ a replaced by its best approximation of `rank`; 0 leaves all as they are.

    tensors: a.* [layers, r, in] and b.* [layers, out, r], fp32; others pass through.
    """
    short = dict(tensors)
    for key in [key for key in tensors if rank and key.startswith("a.")]:
        other = f"b.{key[2:]}"
        left, r = torch.linalg.qr(tensors[other])
        right, s = torch.linalg.qr(tensors[key].mT)
        u, values, v = torch.linalg.svd(r @ s.mT)
        root = values[..., :rank].sqrt()
        short[other] = left @ (u[..., :rank] * root[..., None, :])
        short[key] = (root[..., None] * v[..., :rank, :]) @ right.mT
    return short
