"""Which scheme should I use? What the page's adviser chooses from: a point a scheme, its costs and its times, as JSON.

A point joins what was measured of the same model, method, options, sparsity and policy: quality against the dense cell,
counted sparsity, and times of kernels against the strongest dense step. A level of all block weights is one level, come
to by arithmetic or by counting (harness.results.beside). What was not measured is missing, and the page says so.
Choosing is the page's work (adviser.js), so that it can be done again for every budget.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from harness.results.beside import ASKED, one_scope, times_beside
from harness.results.collect import TIME_RATIO
from harness.results.rows import COLUMNS, no_speed, of_oracles, quantised

SCRIPT = Path(__file__).with_name("adviser.js")
MARKUP = Path(__file__).with_name("adviser.html")
SCHEME = ["model", "method", "variant", "phase"]
KEY = [*SCHEME, *ASKED]
MACHINE = ["device", "dtype"]
SHOWN = [
    *("change", "stderr:change", "perplexity", "stderr:perplexity", "dense:perplexity", "kl", "stderr:kl"),
    *("achieved_model", "achieved_mlp"),
]
UNUSABLE = ("dense", "dense_slice", "random")  # a baseline is nobody's scheme
ENOUGH_ITEMS = 200  # accuracy over fewer answers chooses nothing


def section(lines: pd.DataFrame, rows: pd.DataFrame) -> str:
    """The adviser's markup, data and script.

    lines: of `harness.results.collect.headline`. rows: the measured rows that they come from.
    """
    found = points(lines, rows)
    columns = {"fields": list(found[0]) if found else [], "points": [list(point.values()) for point in found]}
    data = json.dumps(columns, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        MARKUP.read_text()
        + f'<script type="application/json" id="adviser-data">{data}</script>\n<script>\n{SCRIPT.read_text()}</script>'
    )


def points(lines: pd.DataFrame, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """One entry a scheme at one sparsity, in 16 bits; empty where nothing was measured of one.

    times: of the same scheme where it skips as much.
    """
    known = ~lines["method"].isin(UNUSABLE) & (lines["status"] == "ok") & ~quantised(lines)
    lines = lines.loc[known, ["cell_id", *KEY, *SHOWN]]
    counted = lines[["cell_id", *KEY, "achieved_model"]]
    oracles = of_oracles(rows)
    found: list[dict[str, Any]] = []
    for key, cells in lines.groupby(KEY, dropna=False):
        best = cells.sort_values("stderr:change", na_position="last").iloc[0]  # of two, the one with more items
        measured = {
            "loss": _value(-100 * best["change"]),
            "loss_error": _value(100 * best["stderr:change"]),
            "perplexity": _value(best["perplexity"] / best["dense:perplexity"]),
            "perplexity_error": _value(best["stderr:perplexity"] / best["dense:perplexity"]),
            "kl": _value(best["kl"]),
            "kl_error": _value(best["stderr:kl"]),
            "skipped": _value(cells["achieved_model"].mean()),
            "mlp": _value(cells["achieved_mlp"].mean()),
        }
        if measured["skipped"] is None or (measured["loss"] is None and measured["perplexity"] is None):
            continue
        identity = {name: _text(value) for name, value in zip(KEY, key, strict=True)}
        ids = set(cells["cell_id"])
        identity |= {"oracle": bool(ids & oracles), "cell": str(best["cell_id"])}
        found.append(identity | measured)
    table = pd.DataFrame(found, columns=[*KEY, "skipped"]).astype({name: COLUMNS[name] for name in KEY})
    table = one_scope(table.rename(columns={"skipped": "achieved_model"}), SCHEME)
    timed = times_beside(table, times(rows).merge(counted, on="cell_id"), SCHEME, MACHINE)
    by_point = timed.groupby("line")[[*MACHINE, "batch", "context", "speedup"]]
    told = {point: each.to_dict("records") for point, each in by_point}
    return [found[point] | {"times": told.get(point, [])} for point in table.index]


def times(rows: pd.DataFrame) -> pd.DataFrame:
    """Speed-ups of kernels over the strongest dense step: cell_id, device, dtype, batch, context, speedup."""
    wanted = rows[(rows["metric"] == TIME_RATIO) & rows["execution"].isin(["kernel", "kernel_compiled"])]
    wanted = wanted[(wanted["sparsity_requested"].fillna(1) > 0) & ~quantised(wanted) & ~no_speed(wanted)]
    keys = ["cell_id", "device", "dtype", "batch", "context"]
    best = wanted.groupby(keys, dropna=False)["value"].max().rename("speedup").reset_index()
    best["speedup"] = best["speedup"].astype(float).round(3)
    return best.astype({"batch": int, "context": int})


def _value(value: Any) -> float | None:
    return None if pd.isna(value) else float(f"{float(value):.5g}")


def _text(value: Any) -> str | float | None:
    if pd.isna(value):
        return None
    return value if isinstance(value, str) else float(value)
