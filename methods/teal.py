"""TEAL: training-free activation sparsity by magnitude thresholds (arXiv 2408.14690)."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import Quantiles
from harness.model.sees import Sees
from harness.model.selection import PROJECTIONS, Thresholds
from harness.model.step import Policy, Step
from harness.model.view import Block, View
from harness.progress import track
from methods.topk import channels

HIGHEST = 0.9  # block sparsity at which the greedy path ends (section 4.2)


@dataclass(frozen=True)
class Teal(Method):
    """Drops |x_i| <= t at the input of every projection; t is a quantile of |x| on calibration text (section 4.1).

    The paper takes the quantile of a distribution assumed symmetric around zero; the quantile of |x| is the same thing
    without the assumption.

    allocation: "uniform" (the same sparsity everywhere) or "greedy" (Algorithm 1: within each block, raise the
        projection that hurts the block's output least, until the block reaches the sparsity).
    base_step: how much sparsity a greedy step gives to a projection of the size of q.
    greedy_tokens: calibration tokens on which greedy trials are judged.
    """

    allocation: Literal["uniform", "greedy"] = "uniform"
    base_step: float = 0.1
    greedy_tokens: int = 512

    name: ClassVar[str] = "teal"
    paper: ClassVar[str] = "arXiv 2408.14690"
    needs: ClassVar[str] = "calibration"
    fit_fields: ClassVar[tuple[str, ...]] = ("allocation", "base_step", "greedy_tokens")

    def __post_init__(self) -> None:
        if self.allocation not in ("uniform", "greedy"):
            raise ConfigError(f"method.teal.allocation must be uniform or greedy, not {self.allocation!r}")
        if self.allocation == "greedy" and self.sparsity > HIGHEST:
            raise ConfigError(f"greedy allocation goes up to sparsity {HIGHEST}, not {self.sparsity}")

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of all seven projections."""
        return channels(self.sparsity)

    def fit_key(self) -> dict[str, Any]:
        """A uniform fit knows no greedy parameters."""
        key = super().fit_key()
        return key if self.allocation == "greedy" else {k: key[k] for k in ("method", "version", "allocation")}

    def fit(self, view: View, calibration: Calibration) -> State:
        """Quantiles of |x| float32 [layers, grid] by site; for greedy also its path [layers, steps, projections].

        The path is stored for every block sparsity up to 0.9, so one fit serves a whole sweep.
        """
        quantiles = {site: Quantiles(view.n_layers) for site in PROJECTIONS}
        calibration.visit({site: quantiles[site].see for site in PROJECTIONS})
        state = {site: q.grid() for site, q in quantiles.items()}
        if self.allocation == "greedy":
            state["levels"] = greedy_levels(view, calibration, state, self.base_step, self.greedy_tokens)
        return state

    def plan(self, view: View, state: State) -> dict[tuple[str, int], dict[str, Thresholds]]:
        """Thresholds by (site, layer), one for each projection, rounded to the model's dtype."""
        plan = {}
        for layer, level in enumerate(levels_of(view, state.get("levels"), self.sparsity)):
            for site, projections in PROJECTIONS.items():
                made: dict[float, Thresholds] = {}  # equal thresholds share one object, and so one masking pass
                plan[site, layer] = {
                    p: made.setdefault(level[p], threshold(state[site][layer], level[p], view.dtype))
                    for p in projections
                    if p in level
                }
        return plan

    def select(self, plan: dict, site: str, layer: int, x: Tensor, step: Step) -> dict[str, Thresholds]:
        """Static thresholds. x: [batch, tokens, channels]."""
        return plan[site, layer]


def threshold(grid: Tensor, level: float, dtype: torch.dtype) -> Thresholds:
    """The threshold that drops the share `level` of a distribution of |x|, as the model's dtype would hold it."""
    value = Quantiles.at(grid, level) if level > 0 else -1.0
    return Thresholds(torch.tensor(value).to(dtype).item())


def levels_of(view: View, paths: Tensor | None, sparsity: float) -> list[dict[str, float]]:
    """For every layer the level of each projection at a block sparsity: the same one, or a point of its greedy path.

    paths: [layers, steps, projections], or None for a uniform allocation.
    """
    names = view.projection_names()
    if paths is None:
        return [dict.fromkeys(names, sparsity) for _ in view.blocks]
    return [
        dict(zip(names, levels_at(path, shares(view, layer), sparsity).tolist(), strict=True))
        for layer, path in enumerate(paths)
    ]


def shares(view: View, layer: int = 0) -> Tensor:
    """Share of each projection in the weights of all projections of its block, float64 [projections]; 0 if missing."""
    weights = torch.tensor([view.weights(p, layer) for p in view.projection_names()], dtype=torch.float64)
    return weights / weights.sum()


def levels_at(path: Tensor, share: Tensor, sparsity: float) -> Tensor:
    """The point of a greedy path at a block sparsity, between two steps if need be.

    path: [steps, projections]; share: [projections]. Returns float64 [projections] with levels @ share == sparsity.
    """
    path = path.double()
    block = path @ share
    after = int(torch.searchsorted(block, sparsity).clamp(1, len(block) - 1))
    fraction = (sparsity - block[after - 1]) / (block[after] - block[after - 1])
    return path[after - 1] + fraction * (path[after] - path[after - 1])


def greedy_levels(view: View, calibration: Calibration, state: State, base_step: float, tokens: int) -> Tensor:
    """Algorithm 1, block by block: levels float32 [layers, steps, projections], up to block sparsity 0.9.

    A trial raises one projection by base_step * (weights of q / its weights), so that every trial drops equally many
    weights; the trial with the least L2 error of the block's output is taken. Every block is shown dense inputs.
    """
    names = view.projection_names()
    calls = block_calls(view, calibration, tokens)
    paths = [
        greedy_path(view, layer, state, calls[layer], names, base_step)
        for layer in track(range(view.n_layers), "greedy allocation")
    ]
    longest = max(len(path) for path in paths)
    return torch.stack([torch.cat([p, p[-1:].expand(longest - len(p), -1)]) for p in paths]).float()


def block_calls(view: View, calibration: Calibration, tokens: int) -> list[list[tuple[tuple, dict[str, Any]]]]:
    """For every layer the arguments that its block is called with on the first `tokens` calibration tokens."""
    calls: list[list[tuple[tuple, dict[str, Any]]]] = [[] for _ in view.blocks]
    handles = [
        block.layer.register_forward_pre_hook(
            lambda _m, args, kwargs, seen=calls[layer]: seen.append((args, _as_they_are(kwargs))), with_kwargs=True
        )
        for layer, block in enumerate(view.blocks)
    ]
    try:
        with torch.no_grad(), view.tracker.tracking(Policy()):
            seen = 0
            for window in (row[None] for batch in calibration.batches for row in batch):
                view.model(window[:, : tokens - seen], use_cache=False, logits_to_keep=1)
                seen += window.shape[1]
                if seen >= tokens:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _as_they_are(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that later changes of a mapping do not reach: of K and V that blocks leave there for later ones."""
    return {key: copy(value) if isinstance(value, MutableMapping) else value for key, value in kwargs.items()}


def block_error(view: View, layer: int, calls: list, cut: Mapping[str, Any], dense: list[Tensor]) -> float:
    """Mean over tokens of the L2 error of a block's output when each projection drops |x| <= cut[projection].

    Only the second half of each window counts: its tokens have seen a context (section 4.2 uses the last quarter).
    """

    def masker(name: str):  # noqa: ANN202 (a torch hook)
        return lambda _m, args: (torch.nn.functional.hardshrink(args[0], cut[name]), *args[1:])

    block = view.blocks[layer]
    handles = [module.register_forward_pre_hook(masker(n)) for n, module in block.projections() if cut[n] >= 0]
    try:
        errors = []
        for (args, kwargs), target in zip(calls, dense, strict=True):
            out = block_output(block, args, kwargs)
            late = out.shape[-2] // 2
            errors.append((out[..., late:, :].float() - target[..., late:, :]).norm(dim=-1).flatten())
        return torch.cat(errors).mean().item()
    finally:
        for handle in handles:
            handle.remove()


def block_output(block: Block, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The residual stream after a block, [batch, tokens, d_model]; of several streams all of them, first."""
    out = block.layer(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def greedy_path(view: View, layer: int, state: State, calls: list, names: list[str], base_step: float) -> Tensor:
    """The greedy path of one block: levels float64 [steps, projections], the first all zero."""
    share = shares(view, layer)
    there = share.nonzero().flatten().tolist()  # of the projections, those that this block has
    raises = base_step * share[names.index("q")] / share
    grids = {p: state[site][layer] for site, projections in PROJECTIONS.items() for p in projections}
    dense = [block_output(view.blocks[layer], *call).float() for call in calls]
    levels, path = torch.zeros(len(names), dtype=torch.float64), []
    path.append(levels)
    while levels @ share < HIGHEST:
        trials = [torch.where(torch.arange(len(names)) == i, levels + raises, levels) for i in there]
        whole = [t.clamp(max=1.0) for t in trials if t.max() < 1 + 1e-9]  # only rounding is in the way of the last step
        trials = [t for t in trials if t.max() <= 1.0] or whole
        errors = []
        for trial in trials:
            cut = {p: threshold(grids[p], lv, view.dtype).t for p, lv in zip(names, trial.tolist(), strict=True)}
            errors.append(block_error(view, layer, calls, cut, dense))
        levels = trials[min(range(len(trials)), key=errors.__getitem__)]
        path.append(levels)
    return torch.stack(path)
