"""Low-rank predictors of what will be active, and their training (DejaVu, arXiv 2310.17157, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BATCH = 256  # tokens a step; the paper's 1024 is for 400,000 tokens, and would leave too few steps here
LEARNING_RATE = 5e-3  # falls to zero by a cosine
WEIGHT_DECAY = 0.01
HELD_OUT = 0.05  # share of the tokens, at the end of the text, that training does not see
PATIENCE = 5  # epochs without better recall after which training stops
ENOUGH = 0.99  # recall at which it stops


@dataclass(frozen=True, eq=False)
class Predictor:
    """Scores of n candidates from an input of width d: up @ (down @ x). No bias and no non-linearity.

    down: float32 [rank, d]. up: float32 [n, rank]. recall: the best on held-out tokens. held_out: the scores of all
    candidates there, float32 [tokens, n].
    """

    down: Tensor
    up: Tensor
    recall: float
    held_out: Tensor


def unit_rms(x: Tensor) -> Tensor:
    """Every token vector of x [..., d] scaled to a root mean square of 1, in the dtype of x.

    A predictor without a bias ranks the same whatever the length of its input, so this changes no top-k; it keeps the
    few tokens with a huge residual from ruling the training, and makes scores of two tokens comparable.
    """
    return (x.float() * x.float().square().mean(-1, keepdim=True).add(1e-12).rsqrt()).to(x.dtype)


def weighted_bce(logits: Tensor, labels: Tensor, floor: float) -> Tensor:
    """Mean weighted binary cross-entropy on sigmoid(logits): the loss that predictors are trained on (section 4).

    Weight 1 where the label is positive; the label density of the batch + floor where it is negative, so that few
    positives count as much as many negatives. logits: [tokens, n]; labels: bool, same shape.
    """
    weight = torch.where(labels, 1.0, _negative_weight(labels, floor))
    signed = torch.where(labels, logits, -logits)
    return -(weight * torch.nn.functional.logsigmoid(signed)).mean()


def weighted_bce_gradient(logits: Tensor, labels: Tensor, floor: float) -> Tensor:
    """The gradient of `weighted_bce` in the logits, in their dtype."""
    active = torch.sigmoid(logits)
    return torch.where(labels, active - 1, active * _negative_weight(labels, floor)) / labels.numel()


def _negative_weight(labels: Tensor, floor: float) -> float:
    return torch.count_nonzero(labels).item() / labels.numel() + floor


def recall_at_density(scores: Tensor, labels: Tensor) -> float:
    """Share of the positives found when every token may name as many candidates as it has positives.

    scores: [tokens, n]; labels: bool, same shape. At this density recall and precision are the same number.
    """
    allowed = labels.sum(-1, keepdim=True)
    found = labels.gather(-1, scores.argsort(-1, descending=True))
    named = torch.arange(labels.shape[-1], device=labels.device) < allowed
    return ((found & named).sum() / allowed.sum().clamp(min=1)).item()


@torch.no_grad()
def train(x: Tensor, labels: Tensor, rank: int, epochs: int, floor: float, seed: int) -> Predictor:
    """Fit a predictor of labels bool [tokens, n] from x [tokens, d] (unit RMS); keeps the epoch of best recall.

    AdamW on `weighted_bce`. Matmuls are done in bfloat16 where x is, weights are kept in float32. The gradient is
    formed by hand: on a CPU a graph over this elementwise loss costs more than the matmuls. Deterministic by seed.
    """
    cut = len(x) - max(1, round(len(x) * HELD_OUT))
    # Channels of very different size slow AdamW down: train on even ones, and give the scale to `down` afterwards.
    scale = x[:cut].float().square().mean(0).sqrt().clamp(min=1e-6)
    x = (x.float() / scale).to(torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32)
    generator = torch.Generator().manual_seed(seed)
    d, n = x.shape[1], labels.shape[1]
    down, up = (_uniform(shape, generator).to(x.device) for shape in ((rank, d), (n, rank)))
    optimizer = torch.optim.AdamW([down, up], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(cut / BATCH))
    best, kept, since = -1.0, (down, up), 0
    for _ in range(epochs):
        for rows in torch.randperm(cut, generator=generator).to(x.device).split(BATCH):
            inputs, a, b = x[rows], down.to(x.dtype), up.to(x.dtype)
            hidden = inputs @ a.T
            slope = weighted_bce_gradient(hidden @ b.T, labels[rows], floor)
            up.grad = (slope.T @ hidden).float()
            down.grad = ((slope @ b).T @ inputs).float()
            optimizer.step()
            schedule.step()
        recall = recall_at_density(_scores(x[cut:], down, up), labels[cut:])
        since = 0 if recall > best else since + 1
        if recall > best:
            best, kept = recall, (down.clone(), up.clone())
        if since >= PATIENCE or best >= ENOUGH:
            break
    held_out = _scores(x[cut:], *kept).float()
    return Predictor(kept[0] / scale, kept[1], best, held_out)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A linear layer's usual start: uniform within 1 / sqrt(inputs)."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])


def _scores(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return x @ down.to(x.dtype).T @ up.to(x.dtype).T
