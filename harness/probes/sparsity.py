"""Sparsity probe: requested against achieved, counted on held-out text, numerator and denominator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from harness.execution.attach import Fitted, attached, overhead
from harness.execution.ledger import ATTENTION, PHASES, Ledger
from harness.model.step import Policy
from harness.model.view import View
from harness.probes import activations
from harness.probes.bench import Bench, commit_on_text
from harness.progress import track

Row = dict[str, Any]
SHAPES = True  # it says what a timed cell skipped
MLP = ("gate", "up", "down")


@torch.no_grad()
def measure(view: View, methods: Fitted, policy: Policy, windows: Tensor) -> list[Row]:
    """Rows of one pass over windows [n, length]: the first half of each is a prompt, the second half decode tokens.

    Decode tokens are counted in one pass with a phase for each token, as in two-stage scoring. With the counts come the
    thresholds of methods that have any and, where no method skips (a swapped activation aside), the zeros of the gate
    and the magnitudes of `activations.Watch`.
    """
    natural = all(method.swap or not method.sites for method, _ in methods)
    watch = activations.Watch(view) if natural else None
    with attached(view, methods, policy, count=True) as ledger, watch.watching() if watch else nullcontext():
        for window in track(windows.to(view.device).split(4), "sparsity"):
            valid = torch.ones_like(window, dtype=torch.bool)
            decode = valid.clone()
            decode[:, : window.shape[1] // 2] = False
            with view.tracker.hint(valid, decode):
                view.model(window, use_cache=False, logits_to_keep=1)
    assert ledger is not None
    rows = list(rows_of(view, ledger, overhead(view, methods)))
    told = [*(watch.rows() if watch else ()), *activations.thresholds(view, methods, policy)]
    return rows + [{"probe": "sparsity"} | row for row in told]


def windows(probe: Mapping[str, Any]) -> int:
    """Of held-out text."""
    return probe["sparsity"]["windows"]


def run(bench: Bench) -> None:
    """One pass over held-out text."""
    commit_on_text(bench, "sparsity", measure)


def rows_of(view: View, ledger: Ledger, extra: dict[str, int], task: str | None = None) -> Iterator[Row]:
    """The ledger as rows: by layer and site, and the totals `attn`, `mlp` and `model` in weights.

    Of quantised weights the totals' achieved shares are of stored bytes: a skipped input's codes are not read, but the
    scales that it shares with others are.

    extra: weights of 16 bits that deciding touches for each token ("mlp", "attn"); they count as touched.
    """
    assert ledger.tokens is not None
    tokens = {"prefill": ledger.tokens[0].item(), "decode": ledger.tokens[1].item()}
    tokens["all"] = sum(tokens.values())
    kept_of, total_of = ledger.kept, ledger.total
    for (layer, site), kept in sorted(kept_of.items(), key=lambda item: item[0]):
        total = total_of[layer, site]
        metric, name = ("zeros", "mlp_hidden") if site == "zeros" else ("achieved", site)
        own = view.blocks[layer].own_topk if site in ("neurons", "mlp_hidden") else 0.0
        why = f"the model's own top-k sets a share {own:g} of this block's gates to zero" if own else None
        for phase, k, t in _by_phase(kept, total):
            yield _row(metric, 1 - k / t, tokens[phase], phase, name, layer, task=task, message=why)
    for site in sorted({site for _, site in kept_of}):
        kept = torch.stack([v for (_, s), v in kept_of.items() if s == site]).sum(0)
        total = torch.stack([v for (_, s), v in total_of.items() if s == site]).sum(0)
        metric, name = ("zeros", "mlp_hidden") if site == "zeros" else ("achieved", site)
        for phase, k, t in _by_phase(kept, total):
            yield _row(metric, 1 - k / t, tokens[phase], phase, name, None, task=task)
    yield from _cache_rows(ledger, tokens, task)
    groups = {"attn": ATTENTION, "mlp": MLP, "model": ATTENTION + MLP}
    for name, projections in groups.items():
        skipped, total = ledger.skipped_weights(projections)
        cost = extra["mlp"] + extra["attn"] if name == "model" else extra[name]
        skipped = skipped - cost * ledger.tokens
        size = None
        if view.stored is not None:
            skipped_bytes, total_bytes = ledger.skipped_bytes(projections)
            size = (skipped_bytes - 2 * cost * ledger.tokens, total_bytes)
        for (phase, s, t), (_, own, whole) in zip(_by_phase(skipped, total), _by_phase(*size or (skipped, total))):
            yield _row("achieved", own / whole, tokens[phase], phase, name, None, task=task)
            yield _row("skipped_weights", s, tokens[phase], phase, name, None, "weights", task)
            yield _row("total_weights", t, tokens[phase], phase, name, None, "weights", task)
            if size is not None:
                yield _row("skipped_bytes", own, tokens[phase], phase, name, None, "bytes", task)
                yield _row("total_bytes", whole, tokens[phase], phase, name, None, "bytes", task)


def _cache_rows(ledger: Ledger, tokens: Mapping[str, float], task: str | None) -> Iterator[Row]:
    """Bytes of the KV cache that a token reads and those of dense attention, a mean; and the share that is not read.

    By layer where something is skipped, and in all.
    """
    read, seen = ledger.kv_read, ledger.kv_seen
    for layer, dense in sorted(seen.items()):
        if bool((read[layer] < dense).any()):
            for phase, r, d in _by_phase(read[layer], dense):
                yield _row("achieved", 1 - r / d, tokens[phase], phase, "kv", layer, task=task)
    for phase, r, d in _by_phase(*(torch.stack(list(part.values())).sum(0) for part in (read, seen))):
        n = tokens[phase]
        yield _row("achieved", 1 - r / d, n, phase, "kv", None, task=task)
        yield _row("kv_bytes", r / n, n, phase, "kv", None, "bytes/token", task)
        yield _row("kv_bytes_dense", d / n, n, phase, "kv", None, "bytes/token", task)


def _by_phase(part: Tensor, whole: Tensor) -> Iterator[tuple[str, float, float]]:
    for i, phase in enumerate(PHASES):
        if whole[i] > 0:
            yield phase, part[i].item(), whole[i].item()
    yield "all", part.sum().item(), whole.sum().item()


def _row(
    metric: str,
    value: float,
    n: float,
    phase: str,
    site: str,
    layer: int | None,
    unit: str = "share",
    task: str | None = None,
    message: str | None = None,
) -> Row:
    return {
        "probe": "sparsity",
        "metric": metric,
        "value": value,
        "n": int(n),
        "unit": unit,
        "step_phase": phase,
        "site": site,
        "layer": layer,
        "task": task,
        "message": activations.FROM_PRODUCT if metric == "zeros" else message,
    }
