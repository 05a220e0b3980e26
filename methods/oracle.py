"""Oracle: input channels of largest contribution, by column norms. A rule like any other, for all its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import State
from harness.fitting.calibration import Calibration
from harness.model.sees import Sees
from harness.model.selection import PROJECTIONS, SiteSelection
from harness.model.step import Step
from harness.model.view import View
from methods.norms import column_norms, contribution_quantiles, norm_thresholds
from methods.teal import levels_of
from methods.topk import Scored, channels


@dataclass(frozen=True)
class Oracle(Scored):
    """Keeps, for every projection, the inputs i of largest contribution |x_i| * ||W[:, i]||_2.

    What it reads is known when a token comes: norms need no data, x is the token's own. So it is no bound on what
    others can reach, and anyone can deploy it: it is WINA's rule=threshold if pooled, its rule=topk by token, bit for
    bit. Contributions add up as vectors, and keeping the largest does not err least: TEAL, which knows no norms, is
    ahead of it on the embedded model from 30 % on. The name stays because stored rows bear it.

    budget: "pooled" (the largest contributions over all tokens of the calibration text: a token whose activations are
        massive keeps more of them, one that says little keeps fewer) or "token" (exactly k for every token). On the
        embedded model a budget for every token is the worse one, worse even than thresholds that know no weights.
    """

    budget: Literal["pooled", "token"] = "pooled"

    name: ClassVar[str] = "oracle"
    paper: ClassVar[str] = "-"
    version: ClassVar[int] = 2
    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        if self.budget not in ("pooled", "token"):
            raise ConfigError(f"method.oracle.budget must be pooled or token, not {self.budget!r}")

    @property
    def names_neurons(self) -> bool:
        """It reads the weights that every input will meet."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of all seven projections."""
        return channels(self.sparsity)

    def fit(self, view: View, calibration: Calibration) -> State:
        """Quantiles of the contributions float32 [layers, grid] by projection."""
        return contribution_quantiles(view, calibration)

    def plan(self, view: View, state: State) -> dict[tuple[str, int], Any]:
        """By (projection, layer): thresholds on |x| [channels] in the model's dtype, or column norms [channels]."""
        norms = column_norms(view)
        if self.budget == "token":
            return dict(norms)
        return dict(norm_thresholds(norms, state, levels_of(view, None, self.sparsity), view.dtype))

    def score(
        self, plan: dict[tuple[str, int], Any], site: str, layer: int, x: Tensor, step: Step
    ) -> dict[str, Tensor]:
        """Contributions to each projection of x [batch, tokens, channels]."""
        size = x.float().abs()
        return {p: size * plan[p, layer] for p in PROJECTIONS[site] if (p, layer) in plan}

    def select(self, plan: dict[tuple[str, int], Any], site: str, layer: int, x: Tensor, step: Step) -> SiteSelection:
        """The largest contributions, of this token or of all. x: [batch, tokens, channels]."""
        if self.budget == "token":
            return super().select(plan, site, layer, x, step)
        return {p: plan[p, layer] for p in PROJECTIONS[site] if (p, layer) in plan}
