"""Which cells of one scheme stand for the same thing, where one level was come to by arithmetic and by counting.

Quality may be that of a cell with scope=achieved and time that of one with scope=model: the level that was asked for
is of all block weights in both. What joins them is what was counted as skipped, not what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from harness.results.rows import OF_ALL

EQUAL_SPARSITY = 0.02  # a counterpart may skip so much less or more and still count as equally sparse
ASKED = ["scope", "sparsity_requested"]


def one_scope(lines: pd.DataFrame, same: Sequence[str]) -> pd.DataFrame:
    """Without those whose scheme has come nearer to the level in the other scope of all block weights.

    lines: with `ASKED` and `achieved_model`. same: what makes two lines one scheme, beside what was asked for.
    """
    of_all = lines[lines["scope"].isin(OF_ALL)]
    scheme = [*same, "sparsity_requested"]
    off = (of_all["achieved_model"] - of_all["sparsity_requested"]).abs().astype(float)
    by_scope = of_all.assign(_off=off).groupby([*scheme, "scope"], dropna=False, as_index=False)["_off"].mean()
    nearest = by_scope.sort_values("_off", kind="stable").drop_duplicates(scheme)
    kept = of_all.rename_axis("index").reset_index().merge(nearest[[*scheme, "scope"]], on=[*scheme, "scope"])["index"]
    return lines[~lines.index.isin(of_all.index) | lines.index.isin(kept)]


def times_beside(lines: pd.DataFrame, times: pd.DataFrame, same: Sequence[str], on: Sequence[str]) -> pd.DataFrame:
    """The times of each line's scheme as sparse as the line: `line` (its index) and the columns of `times`.

    same: what makes two lines one scheme, beside what was asked for. on: columns of `times` that say where it was
    timed; there the times of one request count: the line's own, or else of those of all block weights the one that
    skips most nearly as much, within `EQUAL_SPARSITY`. Both tables have `same`, `ASKED` and `achieved_model`.
    """
    facts = [*ASKED, "achieved_model"]
    own = lines[[*same, *facts]].rename_axis("line").reset_index()
    pairs = own.merge(times, on=list(same), suffixes=("", ":timed"))
    off = (pairs["achieved_model"] - pairs["achieved_model:timed"]).abs().astype(float).round(3)
    asked, timed = pairs["sparsity_requested"], pairs["sparsity_requested:timed"]
    alike = (asked == timed).fillna(False) | (asked.isna() & timed.isna())
    alike &= (pairs["scope"].fillna("") == pairs["scope:timed"].fillna("")) & ~(off > EQUAL_SPARSITY)
    equal = pairs["scope"].isin(OF_ALL) & pairs["scope:timed"].isin(OF_ALL) & (off <= EQUAL_SPARSITY)
    pairs = pairs.assign(_rank=off.mask(alike, -1.0))[alike | equal]
    request = ["line", *on, *(f"{name}:timed" for name in ASKED)]
    best = pairs.sort_values("_rank", kind="stable").drop_duplicates(["line", *on])[request]
    found = pairs.merge(best, on=request).drop(columns=[*facts, "_rank"])
    return found.rename(columns={f"{name}:timed": name for name in facts})[["line", *times.columns]]
