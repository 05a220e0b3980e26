"""Next-token distributions, a piece at a time: of a long window and a large vocabulary the whole takes gigabytes.

A forward pass leaves its final hidden states, and the head is run on as many positions at once as memory is meant for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.errors import NotANumberError
from harness.model.view import View

PIECE = 1 << 25  # logits at once: 128 MiB in float32


@contextmanager
def final_hidden(view: View) -> Iterator[list[Tensor]]:
    """Collects what each forward pass inside hands the head, [batch, tokens, d_model]; its own logits are of no use.

    The head is run on a single position, since a model can't be told to leave it out.
    """
    states: list[Tensor] = []

    def take(_: torch.nn.Module, args: tuple) -> tuple:
        states.append(args[0].to(view.device))
        return (args[0][:1, :1].contiguous(), *args[1:])

    handle = view.model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        yield states
    finally:
        handle.remove()


def pieces(view: View, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(places, log-probabilities float32 [places, vocabulary]) of final hidden states [n, d_model], in order."""
    for places, logits in logit_pieces(view, hidden):
        yield places, F.log_softmax(logits.float(), dim=-1)


def logit_pieces(view: View, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(places, logits [places, vocabulary] in the head's dtype) of final hidden states [n, d_model], in order."""
    size = max(1, PIECE // view.model.get_output_embeddings().weight.shape[0])
    for start in range(0, len(hidden), size):
        logits = view.logits(hidden[start : start + size].contiguous()).to(view.device)
        yield slice(start, start + len(logits)), logits


@contextmanager
def watched_logits(view: View, where: str) -> Iterator[None]:
    """Raise `NotANumberError` at the end if a logit of the forward passes inside is NaN. where: of what, in words."""
    broken = torch.zeros((), dtype=torch.bool, device=view.device)

    def look(_: torch.nn.Module, __: tuple, logits: Tensor) -> None:
        broken.logical_or_(
            logits.isnan().any().to(view.device)
        )  # asked once at the end: a GPU would wait at every step

    handle = view.model.get_output_embeddings().register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()
    if bool(broken):
        raise not_a_number(view, where)


def not_a_number(view: View, where: str) -> NotANumberError:
    """The error that names NaN as NaN: a comparison of NaN is false, so that it would pass for a wrong answer."""
    hint = " (float16 overflows where bfloat16 does not)" if view.dtype == torch.float16 else ""
    return NotANumberError(f"the logits of {view.name} are NaN, not a number, for {where}{hint}")
