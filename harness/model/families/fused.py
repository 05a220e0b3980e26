"""One linear layer that computes several projections, taken apart so that each can be seen, changed and skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class SplitLinear(nn.Module):
    """Stands where the fused layer stood and gives what it gave, through one linear layer for each part.

    The parts' weights are views of one storage: the fused weight's own, or, where its rows are interleaved by group,
    one with the rows of each part together. The fused layer is let go of, so there is one copy of the weights.
    """

    def __init__(self, parts: Mapping[str, nn.Linear], groups: int) -> None:
        super().__init__()
        self.names, self.groups = tuple(parts), groups
        for name, part in parts.items():
            self.add_module(name, part)

    def parts(self) -> list[Any]:
        """The linear layers, in the order of the fused output."""
        return [getattr(self, name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to the fused layer's output [..., sum of out], rows in its order."""
        outs = [part(x) for part in self.parts()]
        if self.groups == 1:
            return torch.cat(outs, dim=-1)
        return torch.cat([out.unflatten(-1, (self.groups, -1)) for out in outs], dim=-1).flatten(-2)


@torch.no_grad()
def split(parent: nn.Module, name: str, sizes: Mapping[str, int], groups: int = 1) -> SplitLinear:
    """Put a `SplitLinear` in the place of the fused layer `parent.name`, unless it is there already.

    sizes: outputs of each part. groups: how often the parts alternate in the fused rows (GPT-NeoX: once a head).
    """
    fused = getattr(parent, name)
    if isinstance(fused, SplitLinear):
        return fused
    weights, biases = _rows(fused.weight.data, sizes, groups), [None] * len(sizes)
    if fused.bias is not None:
        biases = _rows(fused.bias.data, sizes, groups)
    parts = {}
    for part, weight, bias in zip(sizes, weights, biases, strict=True):
        # of the fused layer's own class: Falcon's multiplies in an order of its own
        linear = type(fused)(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=fused.weight.requires_grad)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=fused.weight.requires_grad)
        parts[part] = linear
    made = SplitLinear(parts, groups).train(fused.training)
    setattr(parent, name, made)
    return made


def _rows(fused: Tensor, sizes: Mapping[str, int], groups: int) -> list[Any]:
    """Rows of each part, [out, ...], as views of one storage."""
    if groups > 1:
        inside = [size // groups for size in sizes.values()]
        fused = torch.cat([rows.flatten(0, 1) for rows in fused.unflatten(0, (groups, -1)).split(inside, dim=1)])
    return list(fused.split(list(sizes.values())))
