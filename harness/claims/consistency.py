"""Answers that change while accuracy stays the same."""

from __future__ import annotations

import numpy as np
import pandas as pd

from harness.claims.evidence import ALPHA, Evidence
from harness.claims.pairs import on_models
from harness.claims.study import POLICY, MissingEvidence, Study, numbers
from harness.results import stats

MATERIAL_FLIPS = 0.02  # share of changed answers that makes outputs inconsistent
GROUPS = ["model", "method", "variant", *POLICY]
MARGIN = 0.01  # a change in accuracy below this, to either side, counts as none


def inconsistent_first(study: Study) -> Evidence:
    """Share of changed answers above `MATERIAL_FLIPS`, by item, in cells whose accuracy is shown to be the same.

    The same: within `MARGIN` of the dense model's, by two one-sided tests on the cell's items (not seeing a loss proves
    none). Of each method on each model the cells are tried from the least sparse on, up to the first that does not
    pass, and the last that passed counts: tried in that fixed order, the error stays at 5 % a method. What must hold
    besides is that the mean change of accuracy over all of them is within the margin too.
    """
    lines = study.select().assign(variant=lambda frame: frame["variant"].fillna(""))
    # Nothing else: a headline has eighty columns, and each would be taken apart for every group.
    lines = lines[[*GROUPS, "cell_id", "sparsity_requested", *({"kl"} & {*lines.columns})]]
    losses: dict[str, pd.Series] = {}
    models, divergence = {}, []
    for _, group in lines.groupby(GROUPS, dropna=False):
        passed = None
        for line in group.sort_values("sparsity_requested").itertuples():
            loss = study.loss(line.cell_id, "accuracy")
            if loss is None:
                continue
            if stats.equivalence(numbers(loss), MARGIN) > ALPHA:
                break
            passed = line, loss
        if passed is not None:
            line, losses[line.cell_id] = passed[0], passed[1]
            models[line.cell_id] = str(line.model)
            divergence.append(getattr(line, "kl", np.nan))
    if not losses:
        raise MissingEvidence(
            f"a cell with items of an informative task enough to show that accuracy is within {MARGIN:.0%} of dense"
        )
    together = pd.DataFrame(losses)
    changed, change = together.abs().mean(axis=1), together.mean(axis=1)
    each = on_models(together.abs() - MATERIAL_FLIPS, [models[cell] for cell in together], numbers)
    kl = pd.Series(divergence, dtype="Float64").mean()
    note = f"{changed.mean():.1%} of answers changed in {len(losses)} cells, accuracy by {-change.mean():+.2%}"
    note += f", KL {kl:.3f}" if pd.notna(kl) else ""
    # One item that changed and one that did not are added: a few answers that happen to agree prove nothing.
    values = np.append(numbers(changed), [1.0, 0.0]) - MATERIAL_FLIPS
    same = stats.equivalence(numbers(change), MARGIN)
    cells = tuple(sorted(losses))
    return Evidence(
        values, "items", "share of answers", cells, besides=same, by_model=each.by_model, errors=each.errors, note=note
    )
