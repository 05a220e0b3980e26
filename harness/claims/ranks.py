"""Whether the leaderboard's order is the same on every model."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.claims import field
from harness.claims.evidence import Evidence
from harness.claims.pairs import lineage
from harness.claims.size import parameters
from harness.claims.study import BASELINES, MissingEvidence, Study
from harness.results import stats

SAME_ORDER = 0.8  # Kendall's tau above which orders count as the same: more than nine of ten pairs of schemes
EDGE = 1e-9  # on it nothing is told
SCHEMES = 4  # fewer have no order to speak of


def order_is_the_same(study: Study) -> Evidence:
    """Rank agreement (Kendall's tau) of the schemes' losses on text between models, at equal achieved sparsity.

    Schemes whose losses are near are in no order that text could tell, so the interval counts only what is sure: pairs
    of schemes that paired tests tell apart on both models, Holm-corrected over all of them. Below, every pair that is
    not told apart counts as turned round; above, as the same. The interval covers if no sign that was told is wrong,
    which holds in 95 % of cases; p is the least level at which it leaves `SAME_ORDER` out.
    """
    boards = _boards(study)
    compared = [
        (level, one, other, sorted(set(boards[level][one]) & set(boards[level][other])))
        for level in boards
        for one, other in combinations(sorted(boards[level], key=lambda model: (parameters(model) or 0, model)), 2)
    ]
    compared = [line for line in compared if len(line[3]) >= SCHEMES]
    if not compared:
        raise MissingEvidence(
            f"{SCHEMES} schemes or more on two or more models, at the same achieved share of all block weights"
        )
    needed = sorted({(level, model) for level, one, other, _ in compared for model in (one, other)})
    signs, adjusted = _told_apart({key: boards[key[0]][key[1]] for key in needed})
    rows = []  # of each pair of schemes in each comparison: same or turned (+1, -1), and at which level that is sure
    for place, (level, one, other, schemes) in enumerate(compared):
        for pair in combinations(schemes, 2):
            keys = [(level, model, *pair) for model in (one, other)]
            rows.append((place, signs[keys[0]] * signs[keys[1]], max(adjusted[key] for key in keys)))
    pairs = pd.DataFrame(rows, columns=["comparison", "sign", "sure"])
    weight = 1 / pairs.groupby("comparison")["sign"].transform("size") / len(compared)
    tau = round(float((pairs["sign"] * weight).sum()), 12)
    low, high = bounds(pairs["sign"].to_numpy(), pairs["sure"].to_numpy(), weight.to_numpy(), 0.05)
    p = _p(pairs["sign"].to_numpy(), pairs["sure"].to_numpy(), weight.to_numpy())
    n = min(len(boards[level][model]) for level, model in needed)
    found = stats.PairedDifference(tau - SAME_ORDER, low - SAME_ORDER, high - SAME_ORDER, p, n, float("nan"))
    sure = pairs["sure"] < 0.05
    note = (
        f"Kendall's tau {tau:.2f} [{low:.2f}, {high:.2f}]; of {len(pairs)} pairs of schemes, "
        f"{int((sure & (pairs['sign'] > 0)).sum())} are told apart in the same order on both models, "
        f"{int((sure & (pairs['sign'] < 0)).sum())} in the opposite one"
    )
    taus = (pairs["sign"] * weight * len(compared)).groupby(pairs["comparison"]).sum()
    note += "; " + ", ".join(
        f"{one} and {other} at {level:.0%} {taus[place]:+.2f} ({len(schemes)} schemes)"
        for place, (level, one, other, schemes) in enumerate(compared)
    )
    cells = {
        boards[level][model].attrs["cells"][name]
        for level, one, other, names in compared
        for model in (one, other)
        for name in names
    }  # noqa: E501
    models = tuple(sorted({model for _, model in needed}))
    unit = f"of Kendall's tau, above {SAME_ORDER}"
    empty = np.zeros(0)
    return Evidence(empty, "stretches of text", unit, tuple(sorted(cells)), between=models, found=found, note=note)


def _boards(study: Study) -> dict[float, dict[str, pd.DataFrame]]:
    """Level -> model -> loss on text against dense, [stretches, schemes], where every token is sparse.

    Of models as they were published: a counterpart trained to be sparse is another kind. Random choices are no scheme:
    they are last everywhere, and would agree by themselves.
    """
    lines = pd.DataFrame(list(field.placed(study)))
    if lines.empty:
        return {}
    lines = lines[lines["missing"].isna() & ~lines["method"].isin(BASELINES) & (lines["phase"] == "all")]
    lines = lines[[lineage(model) == (model, 0) for model in lines["model"]]]
    lines = lines.assign(variant=lines["variant"].fillna("")).drop_duplicates([*field.ARENA, *field.SCHEME])
    boards: dict[float, dict[str, pd.DataFrame]] = {}
    for (level, model), arena in lines.groupby(["level", "model"]):
        losses = field.losses(study, arena["cell_id"], "text", set())
        names = (arena["method"] + " " + arena["variant"]).str.strip()
        cells = dict(zip(names, arena["cell_id"].astype(str), strict=True))
        here = {name: losses[cell] for name, cell in cells.items() if cell in losses}
        if len(here) >= SCHEMES:
            frame = pd.DataFrame(here)
            frame.attrs["cells"] = cells
            boards.setdefault(float(level), {})[str(model)] = frame
    return boards


Pair = tuple[float, str, str, str]  # level, model, two schemes


def _told_apart(boards: dict[tuple[float, str], pd.DataFrame]) -> tuple[dict[Pair, float], dict[Pair, float]]:
    """Of each pair of schemes on each model: which loses more (sign of the first minus the second), and Holm's p.

    By paired t tests: so many pairs ask for smaller p than drawn signs can give.
    """
    signs: dict[Pair, float] = {}
    p: dict[Pair, float] = {}
    for (level, model), losses in boards.items():
        for one, other in combinations(sorted(losses), 2):
            difference = (losses[one] - losses[other]).to_numpy(dtype=float)
            signs[level, model, one, other] = float(np.sign(difference.mean()))
            p[level, model, one, other] = stats.t_test(difference)
    return signs, dict(zip(p, stats.holm(list(p.values())), strict=True))


def bounds(
    sign: NDArray[np.float64], sure: NDArray[np.float64], weight: NDArray[np.float64], level: float
) -> tuple[float, float]:
    """The least and the greatest mean sign that what is sure at this level allows. All [pairs]; weights sum to 1."""
    told = np.where(sure < level, sign, 0.0) @ weight
    open_ = float(np.where(sure < level, 0.0, 1.0) @ weight)
    return round(float(told) - open_, 12), round(float(told) + open_, 12)


def _p(sign: NDArray[np.float64], sure: NDArray[np.float64], weight: NDArray[np.float64]) -> float:
    """The least level at which `bounds` leave `SAME_ORDER` out, or 1."""
    for level in np.unique(sure):
        low, high = bounds(sign, sure, weight, float(np.nextafter(level, 2)))
        if low > SAME_ORDER + EDGE or high < SAME_ORDER - EDGE:
            return float(level)
    return 1.0
