"""Distillation into what a sparse method may learn: the dense model teaches, all weights are frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.model.step import Policy
from harness.model.view import View
from harness.progress import track


def distil(
    view: View, batches: Sequence[Tensor], groups: list[dict[str, Any]], settle: Callable[[float], None] | None = None
) -> list[float]:
    """Train in place, one AdamW step a batch of windows, towards the dense model. Returns the loss before each step.

    The loss is KL(dense || sparse) of the next token, in nats a token. Rates fall to zero by a cosine, without decay.
    The methods that make the model sparse are attached by the caller, who also lets gradients reach the parameters.

    batches: int64 [windows, length]. groups: AdamW's, each with its `params` and `lr`. settle: called with the loss
    between the forward and the backward pass of the sparse model.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates, losses = [group["lr"] for group in optimizer.param_groups], list[float]()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        for step, batch in enumerate(track(batches, "distilling")):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
            with torch.no_grad():
                target = F.log_softmax(log_odds(view, batch, dense=True), dim=-1)
            with torch.enable_grad():
                found = F.log_softmax(log_odds(view, batch, dense=False), dim=-1)
                loss = F.kl_div(found, target, log_target=True, reduction="sum") / batch.numel()
                losses.append(loss.item())
                if settle is not None:
                    settle(losses[-1])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return losses


def log_odds(view: View, windows: Tensor, dense: bool) -> Tensor:
    """Logits float32 [windows, length, vocabulary] of the patched model with every token sparse, or with none.

    A method touches no token that the step calls dense, so the dense model is there without detaching anything.
    """
    valid = torch.ones_like(windows, dtype=torch.bool)
    policy = Policy("decode") if dense else Policy()
    tracker: Any = view.tracker
    with tracker.tracking(policy), tracker.hint(valid, decode=~valid):
        return view.model(windows, use_cache=False).logits.float()
