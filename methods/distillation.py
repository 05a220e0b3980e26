"""Distillation into what a sparse method may learn: the dense model teaches, all weights are frozen.

Memory is bounded whatever the batch and the vocabulary: a batch of more than a backward pass is to hold goes through
in parts, and next-token distributions are compared a piece at a time. What the dense model says of a window is asked
once, however often the window comes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.model.logits import final_hidden, logit_pieces
from harness.model.step import Policy
from harness.model.view import View
from harness.progress import track

HELD = 4 << 30  # bytes of activations, about, that a backward pass may need at once
KEPT = 2 << 30  # bytes of the dense model's final hidden states that wait in main memory for their windows
ROWS = 16  # of logits that a CPU compares at a time: their temporaries stay in its caches
# Of a card, or of what a process may take of it: there a part costs its launches, as many for one window as for eight.
OF_A_CARD = 4


def distil(
    view: View,
    batches: Sequence[Tensor],
    groups: list[dict[str, Any]],
    settle: Callable[[float, int], None] | None = None,
    warm_up: int = 0,
    teacher: Teacher | None = None,
) -> list[float]:
    """Train in place, one AdamW step a batch of windows, towards the dense model. Returns the loss before each step.

    The loss is KL(dense || sparse) of the next token, in nats a token. Rates rise evenly over `warm_up` steps and fall
    to zero by a cosine, without decay. The methods that make the model sparse are attached by the caller, who also
    lets gradients reach the parameters.

    batches: int64 [windows, length]. groups: AdamW's, each with its `params` and `lr`. settle: called before each step,
    when gradients are there, with the loss and the number of tokens that it is a mean of. teacher: of these batches,
    where it knows some of them already.
    """
    teacher = teacher or Teacher(view, batches)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates, losses = [group["lr"] for group in optimizer.param_groups], list[float]()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        for step, batch in enumerate(track(batches, "distilling")):
            share = 0.5 * (1 + math.cos(math.pi * step / len(batches))) * min(1.0, (step + 1) / max(1, warm_up))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            optimizer.zero_grad()
            losses.append(sum(add_gradients(view, part, batch.numel(), teacher) for part in parts(view, batch)))
            if settle is not None:
                settle(losses[-1], batch.numel())
            optimizer.step()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return losses


def parts(view: View, batch: Tensor) -> Sequence[Tensor]:
    """The windows of a batch [windows, length] in as few parts as there may be held, one window at the least.

    Of a projection's input three tensors are taken to be kept for the backward pass, of its output one.
    """
    projections = [module for _, module in view.blocks[0].projections()]
    kept = sum(3 * module.in_features + module.out_features for module in projections)
    window = kept * view.n_layers * view.dtype.itemsize * batch.shape[1]
    held = HELD
    if view.device.type == "cuda":
        total = torch.cuda.get_device_properties(view.device).total_memory
        # workers that share a card are each held to a part of it
        held = max(held, int(total * torch.cuda.get_per_process_memory_fraction(view.device)) // OF_A_CARD)
    return batch.chunk(-(-len(batch) // max(1, held // window)))


class Teacher:
    """The dense model's final hidden states, of each window that comes again computed once while there is room.

    batches: int64 [windows, length], all that will be asked for.
    """

    def __init__(self, view: View, batches: Sequence[Tensor]) -> None:
        self.view = view
        self._left = Counter(name for batch in batches for name in _names(batch))
        self._kept: dict[bytes, Tensor] = {}
        self._room = KEPT

    def learn(self, windows: Tensor, states: Tensor) -> None:
        """Keep what will be asked for. windows: int64 [n, length]; states: [n, length, d_model] of the dense model."""
        for name, state in zip(_names(windows), states, strict=True):
            if self._left[name] and name not in self._kept and self._room >= state.nbytes:
                self._kept[name] = state.detach().to("cpu", copy=True)
                self._room -= state.nbytes

    @torch.no_grad()
    def states(self, windows: Tensor) -> Tensor:
        """Final hidden states [n, length, d_model] of windows [n, length], which are asked for once less from then."""
        names = _names(windows)
        self._left.subtract(names)
        if all(name in self._kept for name in names):
            found = torch.stack([self._kept[name] for name in names]).to(self.view.device)
        else:
            with final_hidden(self.view) as states:
                run(self.view, windows, dense=True)
            [found] = states
            self.learn(windows, found)
        for name in set(names):
            if self._left[name] <= 0 and name in self._kept:
                self._room += self._kept.pop(name).nbytes
        return found


def _names(windows: Tensor) -> list[bytes]:
    """Of each window [n, length] its tokens."""
    return [window.tobytes() for window in windows.cpu().numpy()]


def add_gradients(view: View, windows: Tensor, tokens: int, teacher: Teacher) -> float:
    """Add the gradients of the loss of windows [n, length], a part of `tokens` tokens. Returns that part of it."""
    target = teacher.states(windows)
    with final_hidden(view) as states, torch.enable_grad():
        run(view, windows, dense=False)
    [student] = states
    loss, gradient = divergence(view, student.flatten(0, 1), target.flatten(0, 1))
    student.backward(gradient.view_as(student) / tokens)
    return loss / tokens


def run(view: View, windows: Tensor, dense: bool) -> Any:
    """A forward pass of the patched model over windows [n, length], with every token sparse or with none.

    A method touches no token that the step calls dense, so the dense model is there without detaching anything.
    """
    valid = torch.ones_like(windows, dtype=torch.bool)
    policy = Policy("decode") if dense else Policy()
    tracker: Any = view.tracker
    with tracker.tracking(policy), tracker.hint(valid, decode=~valid):
        return view.model(windows, use_cache=False)


@torch.no_grad()
def divergence(view: View, student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """KL(teacher || student) of the next token in nats, summed over rows, and its gradient [rows, d_model].

    student, teacher: final hidden states [rows, d_model].
    """
    gradient, total = torch.empty_like(student), torch.zeros((), device=student.device)
    for rows, taught in logit_pieces(view, teacher):
        own = student[rows].detach().requires_grad_()
        with torch.enable_grad():
            logits = view.logits(own)
        pull, points = torch.empty_like(logits), taught.float()
        size = ROWS if taught.is_cpu else len(taught)
        for some in (slice(start, start + size) for start in range(0, len(taught), size)):
            target = F.log_softmax(taught[some].float(), dim=-1)
            with torch.enable_grad():
                free = logits.detach()[some].requires_grad_()
                found = F.log_softmax(free.to(target.device).float(), dim=-1)
                own_points = F.kl_div(found, target, log_target=True, reduction="none")
                [pull[some]] = torch.autograd.grad(own_points.sum(), free)
            points[some] = own_points.detach()  # in the logits' place: one sum, however many rows at a time
        total += points.sum()
        [gradient[rows]] = torch.autograd.grad(logits, own, pull)
    return total.item(), gradient
