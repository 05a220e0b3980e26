"""The definition of every kernel in plain torch: any shape, strides, dtype and device, no speed.

One rule of rounding holds throughout: sums run in fp32 (float64 for float64 inputs), and each value that the
Hugging Face module would have stored as a tensor (the outputs of gate and up, act(gate), act(gate) * up, the
result) is rounded to x.dtype once. So a threshold sees the same numbers here as in the masked module.

Shapes: x [..., K]; `wt` is W^T, [K, N]; `w` is row-major, [N, K]; F counts neurons. Weights are finite: what
a dropped channel's weights hold is not defined here (the kernels never read them). A NaN input is never
dropped.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def activation(act: str) -> Callable[[Tensor], Tensor]:
    """The activation called `act`. Raises ValueError for an unknown name."""
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}; got {act}")
    return ACTIVATIONS[act]


def kept(x: Tensor, t: Tensor) -> Tensor:
    """Where |x| > t, bool [..., K], and where x is NaN. t is 0-d or [K]; a negative t keeps everything."""
    return ~(x.abs().to(_wide(x)) <= t)


def hidden(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    """act(gate) * up, each step rounded to gate.dtype; up=None gives act(gate)."""
    a = activation(act)(gate.to(_wide(gate))).to(gate.dtype)
    return a if up is None else a * up


def column_gemv(x: Tensor, wt: Tensor, t: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum of x_i wt[i] over the channels with |x_i| > t_i, plus bias. Returns [..., N].

    t: fp32, 0-d or [K]. t < 0 keeps all channels, t = 0 drops exact zeros only. 2 to 16 rows read the union of their
    channels.
    """
    return _matmul(torch.where(kept(x, t), x, torch.zeros_like(x)), wt, bias)


def column_gemv_index(x: Tensor, wt: Tensor, idx: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum of x_i wt[i] over the channels in idx (integer [m], sorted, unique), plus bias: [..., N]."""
    idx = idx.long()
    return _matmul(x[..., idx], wt[idx], bias)


def column_gemv_glu(
    gate: Tensor, up: Tensor | None, wt: Tensor, t: Tensor, act: str, bias: Tensor | None = None
) -> Tensor:
    """column_gemv of hidden(gate, up, act). gate and up are [..., K]."""
    return column_gemv(hidden(gate, up, act), wt, t, bias)


def dense_gemv(x: Tensor, wt: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ wt + bias: the dense product on the layout of column_gemv."""
    return _matmul(x, wt, bias)


def dense_gemv_rows(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ w.T + bias: the dense product on nn.Linear's layout."""
    return _matmul(x, w.t(), bias)


def row_gemv_index(x: Tensor, w: Tensor, idx: Tensor, bias: Tensor | None = None) -> Tensor:
    """The outputs in idx (integer [m], unique) of x @ w.T + bias; all others are 0. Returns [..., N]."""
    idx = idx.long()
    y = x.new_zeros(*x.shape[:-1], w.shape[0])
    y[..., idx] = _matmul(x, w[idx].t(), None if bias is None else bias[idx])
    return y


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
    """The MLP restricted to the neurons in idx ([m], integer, unique): rows of gate and up, rows of wt_down.

    w_gate, w_up: [F, K]; wt_down: [F, N]. w_gate=None is a plain MLP, down(act(up(x))). Returns [..., N].
    """
    idx = idx.long()
    up = _matmul(x, w_up[idx].t(), None if b_up is None else b_up[idx])
    if w_gate is None:
        h = hidden(up, None, act)
    else:
        h = hidden(_matmul(x, w_gate[idx].t(), None if b_gate is None else b_gate[idx]), up, act)
    return _matmul(h, wt_down[idx], b_down)


def cats_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, wt_down: Tensor, t: Tensor, act: str) -> Tensor:
    """CATS (Lee et al. 2024, section 4): dense gate; only neurons with |act(gate)_i| > t_i reach up and down.

    w_gate, w_up: [F, K]; wt_down: [F, N]; t: fp32, 0-d or [F]. Returns [..., N].
    """
    a = hidden(_matmul(x, w_gate.t(), None), None, act)
    h = torch.where(kept(a, t), a * _matmul(x, w_up.t(), None), torch.zeros_like(a))
    return _matmul(h, wt_down, None)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    keep: Tensor | None = None,
    dropped: str = "exclude",
    scale: float | None = None,
) -> Tensor:
    """Attention of one new token over the first `length` (0-d integer) entries of a cache. Returns [B, H, 1, D].

    q: [B, H, 1, D]; k, v: [B, G, S, D], G divides H; keep: bool [B, G, S] or [B, H, S], or one for all entries, with
    1 in the place of S (None keeps all).
    dropped="exclude": a dropped entry leaves the softmax. dropped="zeros": its key and value are 0, so it
    still takes softmax mass. A head with nothing in its softmax gives 0. scale defaults to 1 / sqrt(D).
    """
    if dropped not in ("exclude", "zeros"):
        raise ValueError(f"dropped must be exclude or zeros, got {dropped}")
    B, H, _, D = q.shape
    G, n = k.shape[1], int(length)
    wide = _wide(q)
    k, v = (c[:, :, :n].to(wide).repeat_interleave(H // G, dim=1) for c in (k, v))
    logits = (q.to(wide) @ k.transpose(-1, -2)) * (D**-0.5 if scale is None else scale)
    if keep is not None:
        keep = keep[:, :, :n] if keep.shape[1] == H else keep[:, :, :n].repeat_interleave(H // G, dim=1)
        keep = keep.expand(-1, -1, n)
        logits = logits.masked_fill(~keep[:, :, None], 0.0 if dropped == "zeros" else -torch.inf)
        v = v.masked_fill(~keep[..., None], 0.0)
    p = logits.softmax(-1)
    if keep is not None and dropped == "exclude":
        p = p.masked_fill(~keep.any(-1)[:, :, None, None], 0.0)
    return (p @ v).to(q.dtype)


def skip_softmax(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, log_scale: float, block: int = 64, scale: float | None = None
) -> Tensor:
    """Decode attention without the blocks of entries that weigh next to nothing (BLASST, arXiv 2512.12087).

    Shapes as in `decode_attention`. A block of `block` entries leaves the softmax where, for every query head of its KV
    head, its largest logit lies below the largest so far (in the order of the cache, its own included) by more than
    -ln(lambda), lambda = exp(log_scale) / length, at most 1.
    """
    B, H, _, D = q.shape
    G, n = k.shape[1], int(length)
    wide = _wide(q)
    k, v = (c[:, :, :n].to(wide).repeat_interleave(H // G, dim=1) for c in (k, v))
    logits = (q.to(wide) @ k.transpose(-1, -2)) * (D**-0.5 if scale is None else scale)
    peaks = F.pad(logits, (0, -n % block), value=-torch.inf).unflatten(-1, (-1, block)).amax(-1)  # [B, H, 1, blocks]
    needed = peaks - peaks.cummax(-1).values >= min(0.0, log_scale - math.log(n))
    needed = needed.unflatten(1, (G, -1)).any(2).repeat_interleave(H // G, dim=1)
    logits = logits.masked_fill(~needed.repeat_interleave(block, -1)[..., :n], -torch.inf)
    return (logits.softmax(-1) @ v).to(q.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _matmul(x: Tensor, wt: Tensor, bias: Tensor | None) -> Tensor:
    y = x.to(_wide(x)) @ wt.to(_wide(x))
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)
