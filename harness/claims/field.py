"""The field at equal achieved sparsity: what each scheme loses there, in intervals, and which can't be told apart.

A cell stands for a level if what was counted to be skipped, of all block weights, is near it, whatever it was asked
for. Nothing is interpolated. A scheme without such a cell has a line that says why, where that is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.claims.evidence import ALPHA
from harness.claims.pairs import stretches
from harness.claims.study import Study, study_of
from harness.results import stats
from harness.results.beside import EQUAL_SPARSITY
from harness.results.collect import ANSWER_TOKENS
from harness.results.rows import OF_ALL, of_oracles, quantised

LEVELS = (0.25, 0.4, 0.5, 0.6)  # of all block weights
ARENA = ["model", "phase", "dense_prefix", "level"]  # lines that are compared with one another
SCHEME = ["method", "variant"]
LEFT_OUT = ("dense", "dense_slice")  # what all are compared with, and a ceiling of speed without quality
MEASURES = ("text", "accuracy", "generated")
COLUMNS = {  # of `board`
    **{name: "string" for name in ("model", "phase", "method", "variant", "scope", "cell_id", "missing")},
    **{name: "Float64" for name in ("level", "sparsity_requested", "achieved_model")},
    **{f"{measure}{part}": "Float64" for measure in MEASURES for part in ("", ":low", ":high")},
    **{f"{measure}:group": "string" for measure in MEASURES},
    **{f"{measure}:n": "Int64" for measure in MEASURES},
    **{name: "Float64" for name in ("answer_tokens", "dense:answer_tokens")},
    **{name: "Int64" for name in ("dense_prefix", "seed")},
    "oracle": "boolean",
}


def board(table: pd.DataFrame, samples: pd.DataFrame, limited: bool = False) -> pd.DataFrame:
    """One line a model, phase policy, level and scheme, best on text first; the columns `COLUMNS`.

    text: perplexity over the dense one's. accuracy: mean over tasks minus the dense one's; generated: the same over the
    tasks whose answers are generated; both as shares. Each with its 95 % interval (`:low`, `:high`), paired with the
    dense cell on the same windows or items, and `:group`: schemes share a letter if no paired test, corrected by Holm
    within model, phase policy, level and measure, tells them apart. `:n`: stretches of text or items. missing: why a
    line has no numbers or no place.

    table: of `harness.results.collect.collect`. samples: of `read_samples`. limited: take smoke runs in.
    """
    study = study_of(table, samples, limited)
    lines = pd.DataFrame([*placed(study), *_absent(table)], columns=list(COLUMNS))
    lines = lines.astype({name: COLUMNS[name] for name in COLUMNS})
    lines = lines.drop_duplicates([*ARENA, *SCHEME]).reset_index(drop=True)
    generated = _generated(study)
    arenas = [arena for _, arena in lines[lines["missing"].isna()].groupby(ARENA, dropna=False)]
    alone = lines["missing"].notna() & lines["achieved_model"].notna()  # measured elsewhere: numbers, but no group
    for arena in [*arenas, *(lines.loc[[index]] for index in lines.index[alone])]:
        for measure in MEASURES:
            _judge(lines, arena, measure, losses(study, arena["cell_id"], measure, generated))
    lines.loc[alone, [f"{measure}:group" for measure in MEASURES]] = None
    lengths = _answer_lengths(study)
    for name in lengths:
        lines[name] = lines["cell_id"].map(lengths[name]).astype("Float64")
    lines["_unplaced"] = lines["missing"].notna()
    order = ["model", "phase", "dense_prefix", "level", "_unplaced", "text", "method", "variant"]
    return lines.sort_values(order, kind="stable").drop(columns="_unplaced").reset_index(drop=True)


# --------------------------------------------------------------------------------------------- who stands where


def placed(study: Study) -> Iterator[dict[str, Any]]:
    """Cells near each level, the nearest first of each scheme; then those that were asked for it and are elsewhere."""
    scored = np.array([(str(cell), "text") in study.items for cell in study.lines["cell_id"]], dtype=bool)
    lines = study.lines[scored].reindex(columns=[*study.lines.columns.difference(["achieved_model"]), "achieved_model"])
    lines = lines[~lines["method"].isin(LEFT_OUT) & lines["achieved_model"].notna()]
    items = {cell: len(values) for (cell, kind), values in study.items.items() if kind == "accuracy"}
    oracles = of_oracles(study.rows)
    for level in LEVELS:
        off = (lines["achieved_model"] - level).abs().astype(float).round(3)
        near = off <= EQUAL_SPARSITY
        asked = lines["scope"].isin(OF_ALL) & (lines["sparsity_requested"] == level).fillna(False)
        few = -lines["cell_id"].map(items).fillna(0).astype(float)
        order = lines.assign(_far=~near, _asked=~asked, _off=off, _few=few)
        order = order[near | asked].sort_values(["_far", "_asked", "_off", "_few", "seed"], kind="stable")
        for line in order.to_dict("records"):
            why = f"asked for {level:.0%}, it skips {line['achieved_model']:.1%}" if line["_far"] else None
            yield _identity(line) | {"level": level, "missing": why, "oracle": line["cell_id"] in oracles}


def _absent(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Schemes that were asked for a level of all block weights and have no results there: why."""
    broken = table[(table["status"] != "ok") & table["scope"].isin(OF_ALL) & table["sparsity_requested"].isin(LEVELS)]
    broken = broken[~quantised(broken)]
    for line in broken.to_dict("records"):
        why = line["message"] if not pd.isna(line["message"]) else line["status"]
        yield _identity(line) | {"level": line["sparsity_requested"], "missing": why, "oracle": False}


def _identity(line: dict[str, Any]) -> dict[str, Any]:
    names = (
        "model",
        "phase",
        "dense_prefix",
        *SCHEME,
        "scope",
        "sparsity_requested",
        "achieved_model",
        "seed",
        "cell_id",
    )
    return {name: line.get(name) for name in names}


# ------------------------------------------------------------------------------------------------ what they lose


def _generated(study: Study) -> set[str]:
    """Tasks whose answers are generated."""
    rows = study.rows[study.rows["metric"].str.startswith("exact_match").fillna(False)]
    return set(rows["task"].dropna())


def losses(study: Study, cells: Iterable[str], measure: str, generated: set[str]) -> pd.DataFrame:
    """Cell minus dense, [units, cells], on the units that all of them have; empty where there are none.

    Text in nats a token, by stretches. Answers weighted so that their mean is the mean over tasks. A cell that was
    scored on less than half of what is usual is left out: it would leave the others no more than its own.
    """
    kind = "text" if measure == "text" else "accuracy"
    columns: dict[str, pd.Series] = {}
    lengths = study.lines.set_index("cell_id")["length"]
    for cell in map(str, cells):
        dense = study.dense_cells.get((cell, kind))
        if dense is None or (cell, kind) not in study.items or (dense, kind) not in study.items:
            continue
        difference = (study.items[cell, kind] - study.items[dense, kind]).dropna()
        if measure == "generated":
            difference = difference[study.tasks_of(difference.index).isin(sorted(generated))]
        if len(difference):
            columns[cell] = difference
    if kind == "text" and columns:
        usual = lengths.loc[list(columns)].mode().iloc[0]
        columns = {cell: column for cell, column in columns.items() if lengths[cell] == usual}
    enough = np.median([len(column) for column in columns.values()]) / 2 if columns else 0
    columns = {cell: column for cell, column in columns.items() if len(column) >= enough}
    if not columns:
        return pd.DataFrame()
    frame = pd.concat(columns, axis=1).dropna()
    if frame.empty:
        return frame
    if kind == "text":
        return pd.DataFrame({cell: stretches(study.in_text(frame[cell]), float(usual))[0] for cell in frame})
    tasks = pd.Series(study.tasks_of(frame.index), index=frame.index)
    weights = len(frame) / (tasks.nunique() * tasks.map(tasks.value_counts()))
    return frame.mul(weights, axis=0)


def _judge(lines: pd.DataFrame, arena: pd.DataFrame, measure: str, differences: pd.DataFrame) -> None:
    """Write means, intervals and groups of one measure into `lines`."""
    if differences.empty:
        return
    places = {cell: index for index, cell in arena["cell_id"].items() if cell in differences}
    worse = 1 if measure == "text" else -1
    means = differences.mean()
    best_first = sorted(places, key=lambda cell: worse * means[cell])
    groups = stats.letters(_apart(differences[best_first].to_numpy(dtype=np.float64)))
    for cell, group in zip(best_first, groups, strict=True):
        found = stats.paired(differences[cell].to_numpy(dtype=np.float64))
        numbers = (found.mean, found.low, found.high)
        shown = [float(np.exp(number)) if measure == "text" else number for number in numbers]
        lines.loc[places[cell], [measure, f"{measure}:low", f"{measure}:high"]] = shown
        lines.loc[places[cell], f"{measure}:n"] = found.n
        lines.loc[places[cell], f"{measure}:group"] = group


def _apart(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which columns of [units, k] differ, by paired tests of all pairs, corrected for their number."""
    k = values.shape[1]
    upper = np.triu_indices(k, 1)
    apart = np.zeros((k, k), dtype=bool)
    if len(values) > 1 and len(upper[0]):
        adjusted = stats.holm(list(stats.sign_flip_pairs(values)[upper]))
        apart[upper] = np.array(adjusted) < ALPHA
    return apart | apart.T


def _answer_lengths(study: Study) -> dict[str, pd.Series]:
    """Mean length of generated answers over tasks, of the cell and of its dense cell."""
    rows = study.rows[study.rows["metric"] == ANSWER_TOKENS]
    cells = rows.groupby("cell_id")
    return {"answer_tokens": cells["value"].mean(), "dense:answer_tokens": cells["dense_value"].mean()}
