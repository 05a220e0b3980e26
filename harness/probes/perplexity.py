"""Perplexity of held-out text, and how far the next-token distributions are from the dense cell's.

The task-free half of the quality probe: one row each for token perplexity, nats a token, bits a byte and, for what has
a dense cell, KL and agreement in the first choice. Texts are random, tokens within one are not: every standard error is
over windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.data.text import Windows
from harness.execution.attach import Fitted, attached
from harness.model.logits import final_hidden, not_a_number, pieces
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.bench import Bench
from harness.progress import track
from harness.results.limited import limited, little_text

Row = dict[str, Any]
AT_ONCE = 8  # windows, on a GPU


def commit(bench: Bench) -> None:
    """The part of the quality probe that this file is."""
    text, dense = bench.config["probe"]["perplexity"], bench.dense_cell

    def make() -> tuple[Any, ...]:
        reference = dense.tensors("perplexity") if dense and text["kl_windows"] else None
        windows = bench.windows(text["windows"])
        facts = (windows, text["kl_windows"], reference, bench.longest)
        return measure(bench.view, bench.fitted, bench.policy, *facts)

    bench.commit("perplexity", make)


@dataclass(frozen=True)
class Score:
    """What one window came to, over its scored tokens: nll in nats, summed; kl (nats) and agreement are means."""

    nll: float
    kl: float | None
    agreement: float | None


@torch.no_grad()
def measure(
    view: View,
    methods: Fitted,
    policy: Policy,
    windows: Windows,
    kl_windows: int,
    dense: dict[str, Tensor] | None,
    longest: int,
) -> tuple[list[Row], pd.DataFrame, dict[str, Tensor]]:
    """Perplexity over windows, and against the dense cell on the first `kl_windows` of them.

    Under phase `all` every token but a window's first is scored. Under `decode` the first half of a window is its
    prompt and only tokens predicted by decode steps are scored.

    dense: the tensors that this function returned for the dense cell, or None for the dense cell itself. longest:
    tokens that the model was made for; windows that are longer are counted as `truncated`.
    Returns rows, scores by window, and for a dense cell its final hidden states (from which the head gives the dense
    distributions again, at a fifth of the cost of a forward pass).
    """
    start = windows.tokens.shape[1] // 2 if policy.phase == "decode" else 0
    scores, kept = [], []
    with attached(view, methods, policy):
        for number, hidden in _hidden(view, policy, windows.tokens, start):
            compared = number < kl_windows
            if compared and dense is None:
                kept.append(hidden.cpu())
            reference = dense["hidden"][number].to(view.device) if compared and dense is not None else None
            scores.append(_score(view, hidden, windows.tokens[number].to(view.device), start, reference))
            if math.isnan(scores[-1].nll):
                raise not_a_number(view, f"window {number} of the perplexity text")
    rows = _rows(scores, windows, start, longest)
    return rows, _samples(scores, windows, start), {"hidden": torch.stack(kept)} if kept else {}


def _hidden(view: View, policy: Policy, windows: Tensor, start: int) -> Iterator[tuple[int, Tensor]]:
    """(number, final hidden states [length, d_model]) of every window int64 [n, length]."""
    # A GPU is idle most of the time on one window; a CPU gains nothing from several and needs the memory.
    several = AT_ONCE if view.device.type == "cuda" else 1
    for first in track(range(0, len(windows), several), "perplexity"):
        ids = windows[first : first + several].to(view.device)
        decode = torch.zeros_like(ids, dtype=torch.bool)
        decode[:, start:] = policy.phase == "decode"
        with view.tracker.hint(torch.ones_like(decode), decode), final_hidden(view) as states:
            view.model(ids, use_cache=False)
        yield from enumerate(states[0], start=first)


def _score(view: View, hidden: Tensor, ids: Tensor, start: int, reference: Tensor | None) -> Score:
    """hidden, reference (the dense cell's): [length, d_model]. ids: int64 [length]. Scored are tokens after `start`."""
    targets, scored = ids[start + 1 :], slice(start, len(ids) - 1)
    nll, kl, agreement = (torch.zeros((), dtype=torch.float64, device=hidden.device) for _ in range(3))
    dense = pieces(view, reference[scored]) if reference is not None else None
    for places, log_p in pieces(view, hidden[scored]):
        nll += F.nll_loss(log_p, targets[places], reduction="sum")
        if dense is not None:
            _, log_q = next(dense)
            kl += F.kl_div(log_p, log_q, log_target=True, reduction="sum")
            agreement += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    if reference is None:
        return Score(nll.item(), None, None)
    return Score(nll.item(), kl.item() / len(targets), agreement.item() / len(targets))


def _rows(scores: list[Score], windows: Windows, start: int, longest: int) -> list[Row]:
    count, length = windows.tokens.shape
    scored = length - 1 - start  # tokens a window
    text = _Text(length, little_text(windows))
    nll = np.array([score.nll for score in scores]) / scored
    perplexity = math.exp(min(float(nll.mean()), 700.0))
    error = _error(nll)
    rows = [
        text.row(
            "token_perplexity", perplexity, count * scored, "ratio", None if error is None else perplexity * error
        ),
        text.row("nll", float(nll.mean()), count * scored, "nats/token", error),
    ]
    if windows.bytes is not None:
        size = windows.bytes[:, start + 1 :].sum(1).numpy()
        bits = nll * scored / math.log(2)
        value = float(bits.sum() / size.sum())
        # Of a ratio of sums, by windows (the delta method).
        error = _error((bits - value * size) / size.mean())
        rows.append(text.row("bits_per_byte", value, int(size.sum()), "bits/byte", error))
    compared = [score for score in scores if score.kl is not None]
    if compared:
        beside_dense = _Text(length, limited(len(compared) * length, "tokens", windows.available * length))
        for metric, unit in (("kl", "nats"), ("agreement", "share")):
            values = np.array([getattr(score, metric) for score in compared])
            name = {"kl": "kl_to_dense", "agreement": "top1_agreement"}[metric]
            rows.append(beside_dense.row(name, float(values.mean()), len(compared) * scored, unit, _error(values)))
    over = count if length > longest else 0
    note = f"windows run beyond the {longest} tokens that the model was made for" if over else None
    return [*rows, text.row("truncated", over, count, "windows") | {"message": note}]


def _samples(scores: list[Score], windows: Windows, start: int) -> pd.DataFrame:
    """One line a window: number, nll (nats, summed), tokens scored, and kl and agreement where it was compared."""
    columns = {name: [getattr(score, name) for score in scores] for name in ("nll", "kl", "agreement")}
    tokens = windows.tokens.shape[1] - 1 - start
    frame = pd.DataFrame({"window": range(len(scores)), "tokens": tokens} | columns)
    return frame.astype({name: "float64" for name in columns})


@dataclass(frozen=True)
class _Text:
    """What the rows of one text have in common. length: tokens a window."""

    length: int
    limited: bool

    def row(self, metric: str, value: float, n: int, unit: str, stderr: float | None = None) -> Row:
        """One of them."""
        return {
            "probe": "quality",
            "task": "perplexity",
            "step_phase": "all",
            "split": "validation",
            "context": self.length,
            "limited": self.limited,
            "metric": metric,
            "value": value,
            "n": n,
            "unit": unit,
            "stderr": stderr,
        }


def _error(windows: np.ndarray) -> float | None:
    """Standard error of a mean over windows; None where there is one, or where a value is infinite."""
    if len(windows) < 2 or not np.isfinite(windows).all():
        return None
    return float(windows.std(ddof=1) / math.sqrt(len(windows)))
