"""Predictivity probe: do the neurons and heads that a method chooses match those that matter, on held-out text?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.execution.attach import Fitted, attached
from harness.execution.masked import Decide, install
from harness.execution.method import Method
from harness.fitting.contribution import Contributions
from harness.model.selection import keep_mask, top_k_count
from harness.model.step import Policy, Step
from harness.model.view import View
from harness.probes.bench import Bench, commit_on_text
from harness.progress import track

Row = dict[str, Any]
SITES = ("neurons", "heads")


@torch.no_grad()
def measure(view: View, methods: Fitted, policy: Policy, windows: Tensor) -> list[Row]:
    """Rows by method, site (neurons, heads), layer, and their mean over layers (layer missing).

    What matters: for each token the k = (1 - sparsity) * n neurons or heads of largest true contribution
    (`Contributions`), without those that contribute nothing at all (a ReLU's zeros). Rows:
        density: share that the method keeps. recall: share of what matters that it keeps. precision: share of what it
        keeps that matters. captured: share of all contribution that it keeps. auc: chance that its score ranks what
        matters above what does not, mean over tokens; only of methods that have a `score(plan, site, layer, x, step)`.

    Every method looks at the activations that it would see if it dropped nothing itself (the methods outside it are
    attached), so rows of different sparsities and predictors speak of the same activations. Only tokens that the policy
    makes sparse count; the first half of each window [n, length] is a prompt, the second half decode tokens. A method
    without these sites, or that does not decide by `select`, gives no rows.
    """
    rows: list[Row] = []
    for place, (method, state) in enumerate(methods):
        watched = [site for site in SITES if site in method.sites]
        if watched and type(method).select is not Method.select:
            with attached(view, methods[:place], policy), method.rewrite(view, state):
                rows += _of(view, method, method.plan(view, state), policy, windows, watched)
    return rows


def windows(probe: Mapping[str, Any]) -> int:
    """Of held-out text."""
    return probe["sparsity"]["windows"]


def run(bench: Bench) -> None:
    """One pass over held-out text."""
    commit_on_text(bench, "predictivity", measure)


def _of(view: View, method: Method, plan: Any, policy: Policy, windows: Tensor, sites: list[str]) -> Iterator[Row]:
    true = Contributions(view)
    seen: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
    tallies = {(site, layer): Tally() for site in sites for layer in range(view.n_layers)}

    def judge(site: str, layer: int, x: Tensor) -> None:
        step = view.tracker.step
        assert step is not None
        x = x.view(*step.valid.shape, -1)
        counted = step.valid if step.sparse is None else step.valid & step.sparse
        keep, score = seen.pop((site, layer))
        contribution = true.of(site, layer, x)
        keep = keep.expand(contribution.shape)[counted]
        contribution = contribution[counted]
        k = top_k_count(contribution.shape[-1], method.sparsity)
        tallies[site, layer].add(contribution, keep, None if score is None else score[counted].float(), k)

    watched = {site: method.sites[site] for site in sites}
    with install(view, watched, watching(method, plan, seen)):
        handles = []
        for layer, block in enumerate(view.blocks):
            for site, module in (("neurons", block.down), ("heads", block.o)):
                if site in sites:
                    # after the watching hooks, so that oracles have decided
                    handles.append(
                        module.register_forward_pre_hook(
                            lambda _m, args, site=site, layer=layer: judge(site, layer, args[0])
                        )
                    )
        try:
            for window in track(windows.to(view.device).split(4), "predictivity"):
                valid = torch.ones_like(window, dtype=torch.bool)
                decode = valid.clone()
                decode[:, : window.shape[1] // 2] = False
                with view.tracker.hint(valid, decode):
                    view.model(window, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
    for site in sites:
        layers = [tallies[site, layer] for layer in range(view.n_layers)]
        for layer, tally in enumerate(layers):
            yield from (
                _row(metric, value, tally.tokens, site, layer, policy) for metric, value in tally.values().items()
            )
        for metric in layers[0].values():
            mean = sum(tally.values()[metric] for tally in layers) / len(layers)
            yield _row(metric, mean, layers[0].tokens, site, None, policy)


def watching(method: Method, plan: Any, seen: dict[tuple[str, int], tuple[Tensor, Tensor | None]]) -> Decide:
    """Decides nothing, and notes in `seen` what `method` would keep.

    seen: (site, layer) -> (keep bool, broadcastable to [batch, tokens, n]; score [batch, tokens, n] or None).
    """
    score = getattr(method, "score", None)

    def decide(site: str, layer: int, x: Tensor, step: Step) -> None:
        selection = method.select(plan, site, layer, x, step)
        assert not isinstance(selection, Mapping)
        keep = torch.ones((), dtype=torch.bool, device=x.device) if selection is None else keep_mask(selection, x)
        seen[site, layer] = (keep, None if score is None else score(plan, site, layer, x, step))

    return decide


class Tally:
    """Sums over the tokens of one site and layer."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: dict[str, float] = dict.fromkeys(("kept", "possible", "hits", "mattering"), 0.0)
        self.captured = self.ranked = 0.0
        self.rankable = 0
        self.scored = False

    def add(self, contribution: Tensor, keep: Tensor, score: Tensor | None, k: int) -> None:
        """Count tokens. contribution float32, keep bool, score float32: [tokens, n]; k: how many matter at most."""
        top = contribution.topk(k, dim=-1, sorted=False).indices
        matters = torch.zeros_like(keep).scatter_(-1, top, True) & (contribution > 0)
        self.tokens += len(keep)
        for name, count in (
            ("kept", keep.sum()),
            ("possible", keep.numel()),
            ("hits", (keep & matters).sum()),
            ("mattering", matters.sum()),
        ):
            self.sums[name] += float(count)
        whole = contribution.sum(-1)
        self.captured += (
            torch.where(whole > 0, (contribution * keep).sum(-1) / whole.clamp(min=1e-30), 1.0).sum().item()
        )
        if score is not None:
            self.scored = True
            area = auc(score, matters)
            self.ranked += area.nansum().item()
            self.rankable += int((~area.isnan()).sum())

    def values(self) -> dict[str, float]:
        """Metric -> share."""
        sums = self.sums
        found = {
            "density": sums["kept"] / max(sums["possible"], 1),
            "recall": sums["hits"] / max(sums["mattering"], 1),
            "precision": sums["hits"] / max(sums["kept"], 1),
            "captured": self.captured / max(self.tokens, 1),
        }
        return found | ({"auc": self.ranked / max(self.rankable, 1)} if self.scored else {})


def auc(score: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve of every row, float32 [tokens]; ties count half; NaN where one class is empty.

    score: float [tokens, n]. positive: bool [tokens, n].
    """
    ordered = score.sort(dim=-1).values
    below = torch.searchsorted(ordered, score)
    upto = torch.searchsorted(ordered, score, right=True)
    rank = (below + upto + 1).float() / 2  # 1-based, the mean rank of equal scores
    yes = positive.sum(-1).float()
    no = score.shape[-1] - yes
    above = (rank * positive).double().sum(-1) - (yes * (yes + 1) / 2).double()
    return (above / (yes * no)).float()


def _row(metric: str, value: float, n: int, site: str, layer: int | None, policy: Policy) -> Row:
    return {
        "probe": "predictivity",
        "metric": metric,
        "value": value,
        "n": n,
        "unit": "share",
        "step_phase": policy.phase,
        "site": site,
        "layer": layer,
    }
