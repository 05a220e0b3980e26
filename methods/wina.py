"""WINA: input channels by magnitude times the norm of the weight column that they meet (arXiv 2505.19427)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.sees import Sees
from harness.model.selection import PROJECTIONS, Selection, Thresholds
from harness.model.step import Step
from harness.model.view import View
from methods.norms import column_norms, contribution_quantiles, norm_thresholds
from methods.rotation import cannot_rotate, rotated
from methods.teal import HIGHEST, Teal, levels_of
from methods.topk import best, channels


@dataclass(frozen=True)
class Wina(Method):
    """Keeps, for every projection, the inputs i of largest |x_i| * ||W[:, i]||_2 (section 3).

    rule: topk (the same number for every token) or threshold (the quantile of the scores on calibration text).
    allocation: uniform, or greedy: TEAL's levels by projection, as in the paper's tables (appendix A.11).
    base_step, greedy_tokens: of TEAL's greedy search.
    transform: rotate the inputs of q, k, v so that k has orthogonal columns, and those of gate and up so that gate has
        (section 3.2); the norms then bound the output error of k and gate tightly. The two products of d_model x
        d_model a block that the residual stream then needs are charged; the paper's own count leaves them out.
    """

    rule: Literal["topk", "threshold"] = "topk"
    allocation: Literal["uniform", "greedy"] = "uniform"
    transform: bool = False
    base_step: float = 0.1
    greedy_tokens: int = 512

    name: ClassVar[str] = "wina"
    paper: ClassVar[str] = "arXiv 2505.19427"
    needs: ClassVar[str] = "calibration"
    fit_fields: ClassVar[tuple[str, ...]] = ("rule", "allocation", "transform")

    def __post_init__(self) -> None:
        for key, known in (("rule", ("topk", "threshold")), ("allocation", ("uniform", "greedy"))):
            if getattr(self, key) not in known:
                raise ConfigError(f"method.wina.{key} must be {' or '.join(known)}, not {getattr(self, key)!r}")
        if not isinstance(self.transform, bool):
            raise ConfigError(f"method.wina.transform must be true or false, not {self.transform!r}")
        if self.allocation == "greedy" and self.sparsity > HIGHEST:
            raise ConfigError(f"greedy allocation goes up to sparsity {HIGHEST}, not {self.sparsity}")

    @property
    def names_neurons(self) -> bool:
        """It reads the columns that every input will meet."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of all seven projections."""
        return channels(self.sparsity)

    @property
    def rotates(self) -> bool:
        """With its transform."""
        return self.transform

    def unsupported(self, view: View) -> str | None:
        """Only what has plain norms can be rotated."""
        return (cannot_rotate(view) if self.transform else None) or super().unsupported(view)

    def fit_key(self) -> dict[str, Any]:
        """A uniform fit knows no greedy parameters."""
        greedy = {"base_step": self.base_step, "greedy_tokens": self.greedy_tokens}
        return super().fit_key() | (greedy if self.allocation == "greedy" else {})

    def fit(self, view: View, calibration: Calibration) -> State:
        """What the options ask for.

        All float32: `basis.attn_in`, `basis.mlp_in` [layers, d_model, d_model]; by projection quantiles of the scores
        [layers, grid]; `levels` [layers, steps, projections], TEAL's greedy path.
        """
        state = bases(view) if self.transform else {}
        with rotated(view, _by_site(state)):
            if self.rule == "threshold":
                state |= contribution_quantiles(view, calibration)
            if self.allocation == "greedy":
                teal = Teal(allocation="greedy", base_step=self.base_step, greedy_tokens=self.greedy_tokens)
                state["levels"] = teal.fit(view, calibration)["levels"]
        return state

    def plan(self, view: View, state: State) -> dict[tuple[str, int], Thresholds | tuple[Tensor, float]]:
        """By (projection, layer): thresholds on |x|, or column norms float32 [channels] and the level."""
        levels = levels_of(view, state.get("levels"), self.sparsity)
        if self.rule == "threshold":
            return dict(norm_thresholds(column_norms(view), state, levels, view.dtype))
        return {(p, layer): (norm, levels[layer][p]) for (p, layer), norm in column_norms(view).items()}

    def select(
        self, plan: dict[tuple[str, int], Any], site: str, layer: int, x: Tensor, step: Step
    ) -> dict[str, Selection]:
        """The best of each token, or static thresholds. x: [batch, tokens, channels]."""
        found = {p: plan[p, layer] for p in PROJECTIONS[site] if (p, layer) in plan}
        if self.rule == "threshold":
            return found
        size = x.float().abs()
        return {p: best(size * norm, level) for p, (norm, level) in found.items()}

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """With the transform: where the bases of attention and MLP meet, a product of d_model x d_model each."""
        adapter = view.n_layers * view.d_model**2
        return {"attn": adapter, "mlp": adapter} if self.transform else {}

    def rewrite(self, view: View, state: State) -> AbstractContextManager[None]:
        """The rotated model; without the transform the model as it is."""
        turned = _by_site(state)
        return rotated(view, turned) if turned and self.sparsity > 0 else nullcontext()


def bases(view: View) -> State:
    """Right singular vectors of k and of gate with their norms' scales, float32 [layers, d_model, d_model] by site."""
    found: dict[str, list[Tensor]] = {"basis.attn_in": [], "basis.mlp_in": []}
    for block, (attn_norm, mlp_norm) in zip(view.blocks, view.norms, strict=True):
        first = block.gate if block.gate is not None else block.up
        for key, module, norm in (("basis.attn_in", block.k, attn_norm), ("basis.mlp_in", first, mlp_norm)):
            assert module is not None, "what can be rotated makes K in every block"
            scale: Any = norm.weight
            folded = module.weight.double() * scale.double()
            found[key].append(torch.linalg.svd(folded, full_matrices=True).Vh.T.float().cpu())
    return {key: torch.stack(layers) for key, layers in found.items()}


def _by_site(state: State) -> dict[str, Tensor]:
    return {key.removeprefix("basis."): value for key, value in state.items() if key.startswith("basis.")}
