"""Answers that change before accuracy falls."""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.claims.evidence import ALPHA, ENOUGH, Evidence
from harness.claims.study import POLICY, MissingEvidence, Study, numbers
from harness.results import stats

MATERIAL_FLIPS = 0.02  # share of changed answers that makes outputs inconsistent


def inconsistent_first(study: Study) -> Evidence:
    """Share of changed answers above `MATERIAL_FLIPS`, by item, where accuracy has not fallen measurably.

    Of each method on each model, the sparsest such cell counts.
    """
    lines = study.select().assign(variant=lambda frame: frame["variant"].fillna(""))
    flips, cells, divergence = [], [], []
    for _, group in lines.groupby(["model", "method", "variant", *POLICY], dropna=False):
        for line in group.sort_values("sparsity_requested", ascending=False).itertuples():
            loss = study.loss(line.cell_id, "accuracy")
            if loss is None or len(loss) < ENOUGH:
                continue
            if stats.paired_bootstrap(numbers(loss), np.zeros(len(loss))).p > ALPHA:
                flips.append(loss.abs())
                cells.append(line.cell_id)
                divergence.append(getattr(line, "kl", np.nan))
                break
    if not flips:
        raise MissingEvidence("a cell with items of an informative task whose accuracy has not fallen measurably")
    changed = pd.concat(flips, axis=1).mean(axis=1)
    kl = pd.Series(divergence, dtype="Float64").mean()
    note = f"{changed.mean():.1%} of answers changed in {len(cells)} cells" + (f", KL {kl:.3f}" if pd.notna(kl) else "")
    return Evidence(numbers(changed) - MATERIAL_FLIPS, "items", "share of answers", tuple(sorted(cells)), note=note)
