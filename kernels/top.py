"""The k largest scores of one token: a decision, not a product, but one that every top-k scheme makes at each site.

For one row torch's topk and a sort take twice as long on a CPU (11 us for 576 scores, these 5), and three launches on a
GPU, where these take one. Of equal scores the first are taken; NaN is above all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.ops import cpu_extension, cuda_function


def top_mask(score: Tensor, k: int) -> Tensor:
    """Where the k largest of score [..., n] are, one row: bool, of its shape. 1 <= k <= n."""
    if score.is_cuda:
        fits, mask = cuda_function("top_fits"), cuda_function("top_mask")
        if fits is not None and mask is not None and fits(score):
            return mask(score, k)
    keep = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    keep[top_indices(score, k).long()] = True
    return keep.view(score.shape)


def top_indices(score: Tensor, k: int) -> Tensor:
    """The places of the k largest of score [..., n], one row: int32 [k], ascending."""
    row = score.reshape(-1)
    if row.is_cpu and row.dtype in (torch.float32, torch.bfloat16) and cpu_extension():
        return torch.ops.dynact_cpu.top_indices(row.contiguous(), k)
    return row.sort(descending=True, stable=True).indices[:k].sort().values.int()
