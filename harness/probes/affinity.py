"""Affinity probe: whether the sets of active neurons suit hardware (ReLU^2 Wins, arXiv 2402.03804).

Reuse from token to token saves loading; neurons that are active together can lie together; and what a batch, or several
decoded tokens at once, touches is the union of their sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.execution.attach import Fitted, attached
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.bench import Bench, commit_on_text
from harness.progress import track

Row = dict[str, Any]
SPANS = (1, 2, 4, 8, 16, 32)  # earlier tokens for reuse; batch sizes and decoded tokens for unions
HUBS = 0.1  # share of the neurons, the most often active, that co-activation is measured without
PARTNERS = 32  # neurons most often active with one: what would lie beside it


@torch.no_grad()
def measure(view: View, methods: Fitted, policy: Policy, windows: Tensor) -> list[Row]:
    """Rows by layer and their mean over layers, from windows int64 [n, length].

    A neuron is active where the input of down is not zero. The first half of each window is a prompt, the second half
    decode tokens; those are looked at. Keeps a byte for every decode token and neuron in memory. Metrics, all shares:

    density: active neurons. reuse_previous: of a token's active neurons, those active for the token before, too.
    reuse_shuffled: what reuse_previous would be if the tokens came in random order, hubs and all: the chance that it
    is to be judged by. reuse_W: those active for any of the W tokens before. coactivation_gap: for a neuron that is no
    hub, how much more likely its 32 best partners are active with it than its partners are on average, hubs left out.
    union_batch: neurons active for any of `batch` sequences at one position. union_W: neurons active for any of W
    tokens in a row.
    """
    active: list[list[Tensor]] = [[] for _ in view.blocks]
    half = windows.shape[1] // 2
    with attached(view, methods, policy):
        for window in track(windows.to(view.device).split(4), "affinity"):
            valid = torch.ones_like(window, dtype=torch.bool)
            decode = torch.arange(window.shape[1], device=window.device).expand_as(window) >= half
            handles = [
                block.down.register_forward_pre_hook(
                    lambda _m, args, kept=kept, shape=window.shape: kept.append(
                        (args[0] != 0).view(*shape, -1)[:, half:]
                    )
                )
                for block, kept in zip(view.blocks, active, strict=True)
            ]
            try:
                with view.tracker.hint(valid, decode):
                    view.model(window, use_cache=False, logits_to_keep=1)
            finally:
                for handle in handles:
                    handle.remove()
    return list(rows_of([torch.cat(parts) for parts in active]))


def windows(probe: Mapping[str, Any]) -> int:
    """Of held-out text."""
    return probe["sparsity"]["windows"]


def run(bench: Bench) -> None:
    """One pass over held-out text."""
    commit_on_text(bench, "affinity", measure)


def rows_of(active: list[Tensor]) -> Iterator[Row]:
    """The rows of active sets, bool [sequences, tokens, neurons] for every layer."""
    layers = [facts(x) for x in active]
    for name, (_, n, batch) in layers[0].items():
        values = [layer[name][0] for layer in layers]
        for layer, value in [*enumerate(values), (None, sum(values) / len(values))]:
            yield {
                "probe": "affinity",
                "metric": "union_batch" if name.startswith("union_batch") else name,
                "value": value,
                "n": n,
                "unit": "share",
                "step_phase": "decode",
                "site": "neurons",
                "layer": layer,
                "batch": batch,
            }


def facts(active: Tensor) -> dict[str, tuple[float, int, int]]:
    """Name -> (share, tokens that it rests on, batch) for one layer's sets, bool [sequences, tokens, neurons]."""
    sequences, tokens, _ = active.shape
    found = {"density": (active.float().mean().item(), sequences * tokens, 1)}
    for span in SPANS:
        if span < tokens:
            name = "reuse_previous" if span == 1 else f"reuse_{span}"
            found[name] = (reuse(active, span), sequences * (tokens - span), 1)
    found["reuse_shuffled"] = (reuse_shuffled(active.flatten(0, 1)), sequences * tokens, 1)
    found["coactivation_gap"] = (coactivation_gap(active.flatten(0, 1)), sequences * tokens, 1)
    for span in SPANS:
        if span <= sequences:
            groups = active[: sequences // span * span].unflatten(0, (-1, span))
            found[f"union_batch_{span}"] = (
                groups.any(1).float().mean().item(),
                groups.numel() // active.shape[2],
                span,
            )
        if 1 < span <= tokens:
            runs = active[:, : tokens // span * span].unflatten(1, (-1, span))
            found[f"union_{span}"] = (runs.any(2).float().mean().item(), runs.numel() // active.shape[2], 1)
    return found


def reuse(active: Tensor, span: int) -> float:
    """Of the active neurons of a token, the share that any of the `span` tokens before had active, too.

    active: bool [sequences, tokens, neurons]. Tokens with fewer than `span` before them are left out.
    """
    tokens = active.shape[1]
    before = torch.stack([active[:, i : tokens - span + i] for i in range(span)]).any(0)
    now = active[:, span:]
    return ((now & before).sum() / now.sum().clamp(min=1)).item()


def reuse_shuffled(active: Tensor) -> float:
    """Expected reuse of the token before in random order, from how often each neuron is active: sum p^2 / sum p.

    active: bool [tokens, neurons]. Neurons that are nearly always active are reused whatever the order.
    """
    often = active.double().mean(0)
    return (often.square().sum() / often.sum().clamp(min=1e-300)).item()


def coactivation_gap(active: Tensor, partners: int = PARTNERS) -> float:
    """How far a neuron's best co-active partners stand out from its average partner, hubs removed.

    active: bool [tokens, neurons]. With P(j | i) the share of i's tokens in which j is active too: the mean over
    neurons i of (mean of the largest `partners` of P(. | i)) - (mean of all of P(. | i)). Hubs, active for nearly any
    token, would be everybody's best partner.
    """
    counts = active.sum(0)
    kept = counts.argsort(descending=True, stable=True)[round(HUBS * len(counts)) :]
    kept = kept[counts[kept] > 0]
    if len(kept) < 2:
        return 0.0
    x = active[:, kept].float()
    given = (x.T @ x) / counts[kept].float()[:, None]
    given.fill_diagonal_(0)
    top = given.topk(min(partners, len(kept) - 1), dim=-1).values.mean(-1)
    return (top - given.sum(-1) / (len(kept) - 1)).mean().item()
