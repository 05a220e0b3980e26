"""What methods share that weigh an input by the norm of the weight column that it meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from harness.execution.method import State
from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import Quantiles
from harness.model.selection import PROJECTIONS, Thresholds
from harness.model.view import View

TINY = 1e-30  # a column of zeros adds nothing: its threshold is out of reach, not infinite times nothing


def column_norms(view: View) -> dict[tuple[str, int], Tensor]:
    """||W[:, i]||_2, float32 [channels] by (projection, layer)."""
    return {
        (name, layer): module.weight.float().norm(dim=0).to(view.device)
        for layer, block in enumerate(view.blocks)
        for name, module in block.projections()
    }


def contribution_quantiles(view: View, calibration: Calibration) -> State:
    """Quantiles of |x_i| * ||W[:, i]||_2 over calibration text, float32 [layers that have it, grid] by projection."""
    norms, quantiles = column_norms(view), {name: Quantiles(view.n_layers) for name in view.projection_names()}

    def see(layer: int, x: Tensor, site: str) -> None:
        for projection in PROJECTIONS[site]:
            if (projection, layer) in norms:
                quantiles[projection].see(layer, x.float().abs() * norms[projection, layer])

    calibration.visit({site: lambda layer, x, site=site: see(layer, x, site) for site in PROJECTIONS})
    return {name: q.grid() for name, q in quantiles.items()}


def norm_thresholds(
    norms: Mapping[tuple[str, int], Tensor], state: State, levels: Sequence[Mapping[str, float]], dtype: torch.dtype
) -> dict[tuple[str, int], Thresholds]:
    """Thresholds on |x| [channels] in a dtype, by (projection, layer), that drop a share of the scores.

    norms: of `column_norms`. state: of `contribution_quantiles`. levels: for every layer the share by projection.
    """
    return {
        (name, layer): Thresholds(
            (Quantiles.at(state[name][layer], levels[layer][name]) / norm.clamp(min=TINY)).to(dtype)
        )
        for (name, layer), norm in norms.items()
    }
