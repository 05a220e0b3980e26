"""What a student is worth: perplexity, divergence from the original, exact zeros, and dropping further neurons."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from harness.training.llama import Model, make_block, norm, rotary


@torch.no_grad()
def evaluate(
    student: Model,
    teacher: Model,
    activation: str,
    thresholds: Tensor,
    windows: Tensor,
    drop: float = 0.0,
    experts: dict[str, Tensor] | None = None,
    batch: int = 16,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float | list[float] | int]:
    """Score `windows` [n, length] token by token; the first token of each is not scored.

    `thresholds` [layers]: of the gate. `drop` is the share of hidden entries that the oracle zeroes in each
    token and layer, those of least |act(gate) * up| (ties are kept); natural zeros count among them.
    `experts`: LTE's `router` [layers, experts, width] and `expert_of` [layers, neurons].

    Returns perplexity, nll (nats a token), kl (teacher to student, nats), agreement (share of equal top-1
    tokens), zeros (mean share) and zeros_by_layer, all over the same tokens, and their count.
    """
    shape, device, dtype = student.shape, student.embedding.device, student.embedding.dtype
    keep = round((1 - drop) * shape.neurons) if drop else 0
    block = make_block(shape, activation, activation, experts=experts is not None)
    plain = make_block(shape, "silu", "silu", statistics=False)
    cos, sin = rotary(shape, torch.arange(windows.shape[1], device=device))
    hard = torch.ones((), device=device)
    sums = torch.zeros(3, device=device, dtype=torch.float64)
    zeros = torch.zeros(shape.layers, device=device, dtype=torch.float64)
    count = 0
    for start in range(0, len(windows), batch):
        tokens = windows[start : start + batch].to(device).long()
        x = y = student.embedding[tokens]
        for i in range(shape.layers):
            (y,) = plain(y, teacher.layer(i), cos, sin, thresholds[i], hard)
            w = student.layer(i)
            if experts is not None:
                w |= {"router": experts["router"][i].to(dtype), "expert_of": experts["expert_of"][i]}
            x, _, share, _ = block(x, w, cos, sin, thresholds[i], hard, keep=keep)
            zeros[i] += share.double() * tokens.numel()
        for row in range(len(tokens)):
            mine, theirs = (
                functional.linear(norm(h[row, :-1], m.final_norm, shape.epsilon), m.head).float()
                for h, m in ((x, student), (y, teacher))
            )
            s, t = mine.log_softmax(-1), theirs.log_softmax(-1)
            sums[0] -= s.gather(-1, tokens[row, 1:, None]).double().sum()
            sums[1] += (t.exp() * (t - s)).sum(-1).double().sum()
            sums[2] += (s.argmax(-1) == t.argmax(-1)).double().sum()
        count += tokens.numel()
        advance()
    scored = count - len(windows)
    nll, kl, agreement = (sums / scored).tolist()
    by_layer = (zeros / count).tolist()
    return {
        "perplexity": math.exp(nll),
        "nll": nll,
        "kl": kl,
        "agreement": agreement,
        "zeros": sum(by_layer) / len(by_layer),
        "zeros_by_layer": by_layer,
        "tokens": scored,
    }
