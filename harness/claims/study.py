"""What the study's claims may look at: rows that count, per-item samples, and cells paired with their counterparts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.results.collect import ACCURACIES, CELL, headline
from harness.results.samples import SAMPLES

SKIPS = 0.005  # least achieved sparsity of a cell that is more than a pretence
EQUAL_SPARSITY = 0.02  # a counterpart may skip so much less and still count as equally sparse
MORE_SPARSITY = 0.05  # or so much more: natural zeros come on top of what is asked for

BASELINES = ("dense", "dense_slice", "random")
COUNTERPARTS = {  # ReLU model -> the SwiGLU model that it comes from, where the name does not say it
    **{f"{name}-{size}": f"llama-2-{size}" for name in ("relullama", "prosparse") for size in ("7b", "13b")},
    **{f"sparsing-law-{size}-relu": f"sparsing-law-{size}-silu" for size in ("0.1b", "0.2b", "0.4b", "0.8b", "1.2b")},
    "minicpm-s-1b": "minicpm-1b",
    "turbosparse-mistral-7b": "mistral-7b",
}
POLICY = ["scope", "phase", "dense_prefix", "seed", "length"]  # in which compared cells are alike


class MissingEvidence(Exception):
    """What a claim lacks, in words."""


@dataclass(frozen=True)
class Study:
    """What claims may look at.

    rows: rows that count. lines: their headline, one a cell, with `length` (tokens of a text window). left_out: cells
    that only pretend to be sparse. counted: cells that were counted to skip something. items: (cell, kind) -> value by
    item, kind accuracy or text (nats a token); chance: cell -> chance of an answer by item. An item is a number that
    `tasks_of` and `names_of` read. room: (cell, task) -> accuracy above chance, if there is any. twins: (cell, kind) ->
    its dense cell.
    """

    rows: pd.DataFrame
    lines: pd.DataFrame
    left_out: tuple[str, ...]
    counted: frozenset[str]
    items: dict[tuple[str, str], pd.Series]
    chance: dict[str, pd.Series]
    room: dict[tuple[str, str], float]
    twins: dict[tuple[str, str], str]
    tasks: pd.Index
    names: pd.Index

    def select(self, *methods: str) -> pd.DataFrame:
        """Lines of methods by name, alone or in a nest; of all but baselines if none is named."""
        keep = [
            bool(names & set(methods)) if methods else not names & set(BASELINES)
            for names in map(set, self.lines["method"].str.split("+"))
        ]
        return self.lines[np.array(keep, dtype=bool)]

    def tasks_of(self, items: pd.Index) -> pd.Index:
        """The task of each item."""
        return self.tasks[items // max(1, len(self.names))]

    def names_of(self, items: pd.Index) -> pd.Index:
        """What the samples call each item: a window's number, or "<part>/<document>"."""
        return self.names[items % max(1, len(self.names))]

    def loss(self, cell: str, kind: str) -> pd.Series | None:
        """Loss against the dense twin by item, above zero is worse; informative tasks only.

        None without samples of both, or where nothing counted that the cell skips anything.
        """
        twin = self.twins.get((cell, kind))
        if twin is None or cell not in self.counted or (cell, kind) not in self.items or (twin, kind) not in self.items:
            return None
        loss = self.items[cell, kind] - self.items[twin, kind]
        loss = (loss if kind == "text" else -loss).dropna()
        if kind == "accuracy":
            informative = [task for task in self.tasks if (twin, task) in self.room]
            loss = loss[self.tasks_of(loss.index).isin(informative)]
        return loss if len(loss) else None

    def able(self, cell: str) -> pd.Series:
        """What the dense twin of this cell can do: its right answers minus those by chance, by item."""
        twin = self.twins[cell, "accuracy"]
        return self.items[twin, "accuracy"] - self.chance[twin]


def study_of(table: pd.DataFrame, samples: pd.DataFrame, limited: bool = False) -> Study:
    """What counts as evidence of a collected table and of `read_samples`. limited: take smoke runs in."""
    rows = table[(table["source"] == "measured") & (table["status"] == "ok")]
    rows = rows if limited else rows[~rows["limited"].fillna(False)]
    quality = rows[rows["probe"] == "quality"]
    samples = _scored(samples.astype(SAMPLES), quality)
    tasks, names = (pd.Index(samples[name].cat.categories.astype(str)) for name in ("task", "item"))
    number = samples["task"].cat.codes.astype("int64") * len(names) + samples["item"].cat.codes
    samples = samples.set_axis(pd.Index(number), axis=0)
    by_cell = {
        (str(cell), str(kind)): group for (cell, kind), group in samples.groupby(["cell_id", "kind"], observed=True)
    }
    items = {key: group["value"].astype("float64") for key, group in by_cell.items()}
    chance = {cell: group["chance"].astype("float64") for (cell, kind), group in by_cell.items() if kind == "accuracy"}
    lines = headline(rows) if len(rows) else pd.DataFrame(columns=CELL)
    texts = samples[samples["kind"] == "text"].groupby("cell_id", observed=True)["tokens"].max() + 1
    lines["length"] = lines["cell_id"].map(texts.rename(index=str)).astype("Float64")
    decode = (lines["phase"] == "decode") & (lines["method"] != "dense") if len(lines) else []
    lines["length"] = lines["length"].where(~np.asarray(decode, dtype=bool), lines["length"] * 2)  # half is prompt
    achieved = lines.reindex(columns=["achieved_mlp", "achieved_model"]).astype("Float64").max(axis=1)
    pretends = ((lines["sparsity_requested"] > 0) & (achieved < SKIPS)).fillna(False).astype(bool)
    left_out = tuple(lines.loc[pretends, "cell_id"])
    counted = frozenset(lines.loc[(achieved >= SKIPS).fillna(False).astype(bool), "cell_id"])
    kind_of = dict.fromkeys(ACCURACIES, "accuracy") | {"nll": "text"}
    quality = quality.assign(kind=quality["metric"].str.replace(r":.*", "", regex=True).map(kind_of))
    related = quality.dropna(subset=["kind", "dense_cell"])[["cell_id", "kind", "dense_cell"]].drop_duplicates()
    twins = {(str(row.cell_id), str(row.kind)): str(row.dense_cell) for row in related.itertuples()}
    return Study(rows, lines[~pretends], left_out, counted, items, chance, _room(samples), twins, tasks, names)


def _scored(samples: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """The samples of cells and tasks that the rows `quality` are about."""
    cells, tasks = (samples[name].cat for name in ("cell_id", "task"))
    known = quality[["cell_id", "task"]].drop_duplicates()
    wanted = np.zeros((len(cells.categories), len(tasks.categories)), dtype=bool)
    place = cells.categories.get_indexer(known["cell_id"]), tasks.categories.get_indexer(known["task"])
    there = (place[0] >= 0) & (place[1] >= 0)
    wanted[place[0][there], place[1][there]] = True
    return samples[wanted[cells.codes, tasks.codes]]


def _room(samples: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Mean value above chance by (cell, task), where it is more than two standard errors."""
    answers = samples[samples["kind"] == "accuracy"]
    above = answers["value"].astype("float64") - answers["chance"].astype("float64")
    by_task = above.groupby([answers["cell_id"], answers["task"]], observed=True).agg(["mean", "sem", "size"])
    enough = by_task[(by_task["size"] > 1) & (by_task["mean"] > 0) & (by_task["mean"] > 2 * by_task["sem"])]
    return {(str(cell), str(task)): float(mean) for (cell, task), mean in enough["mean"].items()}


# --------------------------------------------------------------------------------------------- what is paired


def options(variant: str | float | None) -> dict[str, str]:
    """The options of a row's `variant`: "kv=skip,unit=group" -> {"kv": "skip", "unit": "group"}."""
    if not isinstance(variant, str):
        return {}
    return dict(part.split("=", 1) for part in variant.replace(";", ",").split(",") if "=" in part)


def by_option(lines: pd.DataFrame, option: str, default: str, ignore: tuple[str, ...] = ()) -> pd.DataFrame:
    """Add `choice` (the option's value) and `rest` (the other options, but those to ignore, as one text)."""
    read = [options(variant) for variant in lines["variant"]]
    rest = [",".join(f"{k}={v}" for k, v in sorted(o.items()) if k not in (option, *ignore)) for o in read]
    return lines.assign(choice=[o.get(option, default) for o in read], rest=rest)


def contrast(lines: pd.DataFrame, worse: str, better: str, extra: tuple[str, ...] = ()) -> pd.DataFrame:
    """Cells of `choice` worse beside those of better, alike in all else: columns cell_id_worse, cell_id_better."""
    keys = ["model", "method", "rest", "sparsity_requested", *POLICY, *extra]
    parts = [lines[lines["choice"] == choice] for choice in (worse, better)]
    return parts[0].merge(parts[1], on=keys, suffixes=("_worse", "_better"))


def matched_models(lines: pd.DataFrame, having: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(SwiGLU model, ReLU counterpart) of the models `having` what is to be compared.

    The SwiGLU model is the control that was trained alike, where it has that too, else the base.
    """
    kinds = lines.drop_duplicates("model").set_index("model")["activation"].fillna("").str.lower()
    kinds = kinds[kinds.index.isin(list(having))]
    for name, activation in kinds.items():
        if "relu" not in activation:
            continue
        base = COUNTERPARTS.get(str(name), str(name).rpartition("-")[0])
        for candidate in (f"{base}-control", base):
            if candidate in kinds.index and "relu" not in kinds[candidate]:
                yield candidate, str(name)
                break


def equally_sparse(study: Study, kind: str) -> pd.DataFrame:
    """The pairs of `sparsity_pairs` among the cells that have items of this kind, baselines left out."""
    lines = study.select()
    return sparsity_pairs(lines[np.array([(cell, kind) in study.items for cell in lines["cell_id"]], dtype=bool)])


def sparsity_pairs(lines: pd.DataFrame) -> pd.DataFrame:
    """Cells of a SwiGLU model beside the ReLU cell of the same method that skips as much of the MLPs, or a little more.

    lines: of `collect.headline`, with `length`. Columns: swiglu, relu (cells), pair (models), method, achieved (of the
    SwiGLU cell), length. A ReLU model's natural zeros come on top of what is asked for, so cells are matched by what
    was achieved, in the MLPs and (attention included) in the whole model: less by `EQUAL_SPARSITY` or more by
    `MORE_SPARSITY` at most. Without that upper bound a grid with holes would pair a tenth with nine tenths.
    """
    columns = ["swiglu", "relu", "pair", "method", "achieved", "length"]
    if not {"achieved_mlp", "achieved_model"} <= set(lines):
        return pd.DataFrame(columns=columns)
    lines = lines[(lines["achieved_mlp"] > 10 * SKIPS).fillna(False).to_numpy(dtype=bool)]
    lines = lines.assign(variant=lines["variant"].fillna(""), achieved_model=lines["achieved_model"].fillna(0))
    found = []
    for _, alike in lines.groupby(["method", "variant", *POLICY], dropna=False):
        cells = list(alike.itertuples())
        for swiglu, relu in matched_models(lines, {line.model for line in cells}):
            for line in (line for line in cells if line.model == swiglu):
                as_sparse = [
                    other
                    for other in cells
                    if other.model == relu
                    and all(
                        -EQUAL_SPARSITY <= getattr(other, total) - getattr(line, total) <= MORE_SPARSITY
                        for total in ("achieved_mlp", "achieved_model")
                    )
                ]
                if as_sparse:
                    nearest = min(as_sparse, key=lambda other: other.achieved_mlp)
                    who = {"swiglu": line.cell_id, "relu": nearest.cell_id, "pair": f"{swiglu} and {relu}"}
                    method = f"{line.method} {line.variant} {line.phase}"
                    found.append(who | {"method": method, "achieved": line.achieved_mlp, "length": line.length})
    return pd.DataFrame(found, columns=columns)


def gaps(study: Study, pairs: pd.DataFrame, worse: str, better: str, kind: str) -> pd.DataFrame:
    """Loss of the worse cell minus loss of the better one, items x rows of `pairs`; what is not paired is left out.

    Windows of another length are other items: of several lengths, the one that most pairs have counts. All pairs are
    judged on the same items, so one that was scored on few (less than half of what is usual) is left out too: it would
    leave the others no more than its own.
    """
    lengths = pairs["length"].mode()
    if kind == "text" and len(lengths):
        pairs = pairs[pairs["length"] == lengths.iloc[0]]
    columns = {}
    for index, pair in pairs.iterrows():
        ours, theirs = study.loss(pair[worse], kind), study.loss(pair[better], kind)
        if ours is not None and theirs is not None:
            columns[index] = (ours - theirs).dropna()
    usual = np.median([len(column) for column in columns.values()]) if columns else 0
    columns = {index: column for index, column in columns.items() if len(column) >= usual / 2}
    return pd.concat(columns, axis=1).dropna() if columns else pd.DataFrame()


def slopes(gap: pd.DataFrame, at: NDArray[np.float64]) -> pd.Series:
    """Least-squares slope of every item's gap over `at`. gap: items x cells."""
    centred = at - at.mean()
    return (gap * centred).sum(axis=1) / (centred**2).sum()


def rows_by_layer(study: Study, metric: str, **where: object) -> pd.DataFrame:
    """Rows of one metric with a layer, by cell, site and layer, joined with the cell's line."""
    rows = study.rows[(study.rows["metric"] == metric) & study.rows["layer"].notna()]
    for name, value in where.items():
        rows = rows[rows[name] == value]
    rows = rows[["cell_id", "layer", "site", "step_phase", "batch", "value"]]
    return rows.merge(
        study.lines[["cell_id", "model", "method", "variant", "sparsity_requested", *POLICY]], on="cell_id"
    )


def need(frame: pd.DataFrame, missing: str) -> pd.DataFrame:
    """The frame, or `MissingEvidence` where it is empty."""
    if frame.empty:
        raise MissingEvidence(missing)
    return frame


def numbers(series: pd.Series) -> NDArray[np.float64]:
    """float64 [n]."""
    return series.to_numpy(dtype=np.float64)


def used(*columns: pd.Series) -> tuple[str, ...]:
    """Cells named in these columns, sorted."""
    return tuple(sorted({str(cell) for column in columns for cell in column}))
