"""The kernels' maths through torch's own operators, for every call that the C++ fast path does not take.

Two uses. Many rows (a prefill, a large batch), other dtypes, non-contiguous weights: one matmul on zeroed inputs,
nothing is skipped. One row on a machine without a C++ compiler: `embedding_bag` over the transposed weight,
the only operator of torch that reads just the rows it needs without copying them; products with rows of a
row-major weight run dense.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference
from kernels.reference import activation, hidden, kept


def column_gemv(x: Tensor, wt: Tensor, t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Thresholded columns by embedding_bag for one row, by a matmul on zeroed inputs for more."""
    keep = kept(x, t)
    if _one_row(x):
        return _sum_rows(x, wt, keep.flatten().nonzero().flatten(), bias)
    return F.linear(torch.where(keep, x, torch.zeros_like(x)), wt.t(), bias)


def column_gemv_index(x: Tensor, wt: Tensor, idx: Tensor, bias: Tensor | None = None) -> Tensor:
    """Listed columns, the same two ways."""
    if _one_row(x):
        return _sum_rows(x, wt, idx.long(), bias)
    mask = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
    mask[idx.long()] = True
    return F.linear(torch.where(mask, x, torch.zeros_like(x)), wt.t(), bias)


def column_gemv_glu(
    gate: Tensor, up: Tensor | None, wt: Tensor, t: Tensor, act: str, bias: Tensor | None = None
) -> Tensor:
    """The activated product first, then column_gemv."""
    return column_gemv(hidden(gate, up, act), wt, t, bias)


def dense_gemv(x: Tensor, wt: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear on the transposed view."""
    return F.linear(x, wt.t(), bias)


def dense_gemv_rows(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear."""
    return F.linear(x, w, bias)


def row_gemv_index(x: Tensor, w: Tensor, idx: Tensor, bias: Tensor | None = None) -> Tensor:
    """A dense product whose other outputs are dropped."""
    idx = idx.long()
    y = F.linear(x, w, bias)
    out = torch.zeros_like(y)
    out[..., idx] = y[..., idx]
    return out


def neuron_mlp(
    x: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    wt_down: Tensor,
    idx: Tensor,
    act: str,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """Gate and up run dense, the columns of down are skipped."""
    up = F.linear(x, w_up, b_up)
    h = hidden(up, None, act) if w_gate is None else hidden(F.linear(x, w_gate, b_gate), up, act)
    return column_gemv_index(h, wt_down, idx, b_down)


def cats_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, wt_down: Tensor, t: Tensor, act: str) -> Tensor:
    """Gate and up run dense, the columns of down are skipped."""
    a = activation(act)(F.linear(x, w_gate))
    keep = kept(a, t)
    h = a * F.linear(x, w_up)
    if _one_row(x):
        return _sum_rows(h, wt_down, keep.flatten().nonzero().flatten(), None)
    return F.linear(torch.where(keep, h, torch.zeros_like(h)), wt_down.t())


decode_attention = reference.decode_attention
skip_softmax = reference.skip_softmax


def _one_row(x: Tensor) -> bool:
    return x.numel() == x.shape[-1] and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _sum_rows(x: Tensor, wt: Tensor, idx: Tensor, bias: Tensor | None) -> Tensor:
    start = torch.zeros(1, dtype=idx.dtype)
    y = F.embedding_bag(idx, wt, start, mode="sum", per_sample_weights=x.flatten()[idx])
    y = y.reshape(*x.shape[:-1], wt.shape[1])
    return y if bias is None else y + bias
