"""LaRoSA: top-k of inputs rotated layer by layer (arXiv 2507.01299)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import State
from harness.fitting.calibration import Calibration
from harness.model.sees import Sees
from harness.model.selection import PROJECTIONS, TopK
from harness.model.step import Step
from harness.model.view import View
from methods.rotation import NORM_OF, cannot_rotate, rotated
from methods.topk import Scored, best, channels

MOST = 0.98  # level that a tilted site may reach; what it can't take goes to the others


@dataclass(frozen=True)
class LaRoSA(Scored):
    """Keeps the same number of largest inputs for every token, those of q, k, v, gate and up in rotated coordinates.

    The rotation of a layer holds the eigenvectors of the second moment of its normalised attention input (section 3.2);
    as in the released code it serves the MLP's input too. Inputs of o and down can't be rotated: heads and the product
    with the gate forbid it.

    rotation: pca, random (an orthogonal matrix drawn by `seed`) or none.
    tilt: rotated inputs are cut by 1 - tilt, those of o and down by 1 + tilt times a common level (0.2 in the released
        code). That level is set so that all together come to `sparsity` of the block's weights; the paper's own number
        p is the common level itself, about 7 % more than is skipped.

    Between two blocks the rotated residual stream needs a product of d_model x d_model, which is charged.
    """

    rotation: Literal["pca", "random", "none"] = "pca"
    tilt: float = 0.2
    seed: int = 0

    name: ClassVar[str] = "larosa"
    paper: ClassVar[str] = "arXiv 2507.01299"
    needs: ClassVar[str] = "calibration"
    fit_fields: ClassVar[tuple[str, ...]] = ("rotation", "seed")

    def __post_init__(self) -> None:
        known = ("pca", "random", "none")
        if self.rotation not in known:
            raise ConfigError(f"method.larosa.rotation must be one of {', '.join(known)}, not {self.rotation!r}")
        if not -1 < self.tilt < 1:
            raise ConfigError(f"method.larosa.tilt must lie between -1 and 1, not {self.tilt}")

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of all seven projections."""
        return channels(self.sparsity)

    @property
    def rotates(self) -> bool:
        """Unless its rotation is left out."""
        return self.rotation != "none"

    def unsupported(self, view: View) -> str | None:
        """Only what has plain norms can be rotated."""
        return (None if self.rotation == "none" else cannot_rotate(view)) or super().unsupported(view)

    def fit(self, view: View, calibration: Calibration) -> State:
        """`basis` float32 [layers, d_model, d_model], columns by falling eigenvalue; nothing without a rotation."""
        if self.rotation == "none":
            return {}
        d = view.d_model
        if self.rotation == "random":
            generator = torch.Generator().manual_seed(self.seed)
            drawn = (torch.randn(d, d, generator=generator, dtype=torch.float64) for _ in view.blocks)
            return {"basis": torch.stack([torch.linalg.qr(matrix).Q.float() for matrix in drawn])}
        moments = [torch.zeros(d, d, dtype=torch.float64) for _ in view.blocks]

        def see(layer: int, x: Tensor) -> None:
            flat = x.flatten(0, 1).float()
            moments[layer] += (flat.T @ flat).double().cpu()

        as_is = torch.eye(d).expand(view.n_layers, d, d)
        with rotated(view, {"attn_in": as_is}):  # no turn: it folds the norm's scale away
            calibration.visit({"attn_in": see})
        return {"basis": torch.stack([torch.linalg.eigh(m).eigenvectors.flip(-1).float() for m in moments])}

    def plan(self, view: View, state: State) -> dict[str, float]:
        """The level of each site."""
        weights = {
            site: sum(view.weights(p) for p in PROJECTIONS[site] if p in view.projection_names())
            for site in PROJECTIONS
        }
        return tilted(weights, self.sparsity, self.tilt)

    def score(self, plan: dict[str, float], site: str, layer: int, x: Tensor, step: Step) -> Tensor:
        """Magnitudes of x [batch, tokens, channels], rotated by now where they are to be."""
        return x.abs()

    def select(self, plan: dict[str, float], site: str, layer: int, x: Tensor, step: Step) -> TopK:
        """The site's share of each token. x: [batch, tokens, channels]."""
        return best(self.score(plan, site, layer, x, step), plan[site])

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """One product of d_model x d_model a block."""
        return {} if self.rotation == "none" else {"attn": view.n_layers * view.d_model**2}

    def rewrite(self, view: View, state: State) -> AbstractContextManager[None]:
        """The rotated model."""
        if self.sparsity == 0 or self.rotation == "none":
            return nullcontext()
        return rotated(view, dict.fromkeys(NORM_OF, state["basis"]))


def tilted(weights: Mapping[str, float], sparsity: float, tilt: float) -> dict[str, float]:
    """Levels by site: common * (1 - tilt) at rotated sites and common * (1 + tilt) at others.

    The common level makes their mean, by weights, `sparsity`. weights: by site. No level exceeds MOST: beyond, the
    other sites take what is missing.
    """
    factor = {site: 1 - tilt if site in NORM_OF else 1 + tilt for site in weights}
    total = sum(weights.values())
    common = sparsity * total / sum(weights[site] * factor[site] for site in weights)
    levels = {site: common * factor[site] for site in weights}
    over = {site for site, level in levels.items() if level > MOST}
    if over and sparsity < MOST:
        left = sparsity * total - MOST * sum(weights[site] for site in over)
        rest = left / sum(weights[site] for site in weights if site not in over)
        return {site: MOST if site in over else rest for site in weights}
    return {site: min(level, sparsity) if over else level for site, level in levels.items()}
