"""What the study's claims may look at: rows that count and per-item samples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.results.collect import ACCURACIES, CELL, headline
from harness.results.once import once
from harness.results.rows import quantised
from harness.results.samples import SAMPLES

SKIPS = 0.005  # least achieved sparsity of a cell that is more than a pretence
BASELINES = ("dense", "dense_slice", "random")
POLICY = ["scope", "phase", "dense_prefix", "seed", "length"]  # in which compared cells are alike


class MissingEvidence(Exception):
    """What a claim lacks, in words."""


@dataclass(frozen=True)
class Study:
    """What claims may look at.

    rows: rows that count. lines: their headline, one a cell, with `length` (tokens of a text window). quantised: lines
    of cells of quantised weights, which are in neither: another model under the same name. left_out: cells that only
    pretend to be sparse. counted: cells that were counted to skip something. items: (cell, kind) -> value by
    item, kind accuracy or text (nats a token); chance: cell -> chance of an answer by item. An item is a number that
    `tasks_of` and `names_of` read. informative: the (dense cell, task) that can show a loss, because the dense model is
    above chance. dense_cells: (cell, kind) -> its dense cell.
    """

    rows: pd.DataFrame
    lines: pd.DataFrame
    left_out: tuple[str, ...]
    counted: frozenset[str]
    items: dict[tuple[str, str], pd.Series]
    chance: dict[str, pd.Series]
    informative: frozenset[tuple[str, str]]
    dense_cells: dict[tuple[str, str], str]
    tasks: pd.Index
    names: pd.Index
    quantised: pd.DataFrame
    _losses: dict[tuple[str, str], pd.Series | None] = field(default_factory=dict, init=False, repr=False)

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

    def in_text(self, values: pd.Series) -> pd.Series:
        """Values by window, indexed by the window's place in the text."""
        return values.set_axis(self.names_of(values.index).astype(int))

    def loss(self, cell: str, kind: str) -> pd.Series | None:
        """Loss against the dense cell by item, above zero is worse; informative tasks only.

        None without samples of both, or where nothing counted that the cell skips anything. Nobody may change it.
        """
        if (cell, kind) not in self._losses:  # claims ask for one four times
            self._losses[cell, kind] = self._loss(cell, kind)
        return self._losses[cell, kind]

    def _loss(self, cell: str, kind: str) -> pd.Series | None:
        dense = self.dense_cells.get((cell, kind))
        if (
            dense is None
            or cell not in self.counted
            or (cell, kind) not in self.items
            or (dense, kind) not in self.items
        ):
            return None
        loss = self.items[cell, kind] - self.items[dense, kind]
        loss = (loss if kind == "text" else -loss).dropna()
        if kind == "accuracy":
            informative = [task for task in self.tasks if (dense, task) in self.informative]
            loss = loss[self.tasks_of(loss.index).isin(informative)]
        return loss if len(loss) else None

    def at_stake(self, cell: str) -> pd.Series:
        """What there was to lose: the right answers of this cell's dense cell minus those by chance, by item."""
        dense = self.dense_cells[cell, "accuracy"]
        return self.items[dense, "accuracy"] - self.chance[dense]


@once
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
    pretends = (wants_sparsity(lines) & (achieved < SKIPS)).fillna(False).astype(bool)
    left_out = tuple(lines.loc[pretends, "cell_id"])
    counted = frozenset(lines.loc[(achieved >= SKIPS).fillna(False).astype(bool), "cell_id"])
    kind_of = dict.fromkeys(ACCURACIES, "accuracy") | {"nll": "text"}
    quality = quality.assign(kind=quality["metric"].str.replace(r":.*", "", regex=True).map(kind_of))
    related = quality.dropna(subset=["kind", "dense_cell"])[["cell_id", "kind", "dense_cell"]].drop_duplicates()
    dense_cells = {(str(row.cell_id), str(row.kind)): str(row.dense_cell) for row in related.itertuples()}
    small = quantised(lines)
    rows = rows[~rows["cell_id"].isin(lines.loc[small, "cell_id"])]
    informative = _informative(samples)
    kept = lines[~pretends & ~small]
    found = (rows, kept, left_out, counted, items, chance, informative, dense_cells, tasks, names)
    return Study(*found, quantised=lines[~pretends & small])


def wants_sparsity(rows: pd.DataFrame) -> pd.Series:
    """Whether they are of a method that is to skip something: bool, by row. An error budget asks for no level."""
    asked, own = rows["sparsity_requested"] != 0, rows["method"] != "dense"
    return asked.fillna(True).astype(bool) & own.fillna(True).astype(bool)


def _scored(samples: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """The samples of cells and tasks that the rows `quality` are about."""
    cells, tasks = (samples[name].cat for name in ("cell_id", "task"))
    known = quality[["cell_id", "task"]].drop_duplicates()
    wanted = np.zeros((len(cells.categories), len(tasks.categories)), dtype=bool)
    place = cells.categories.get_indexer(known["cell_id"]), tasks.categories.get_indexer(known["task"])
    there = (place[0] >= 0) & (place[1] >= 0)
    wanted[place[0][there], place[1][there]] = True
    return samples[wanted[cells.codes, tasks.codes]]


def _informative(samples: pd.DataFrame) -> frozenset[tuple[str, str]]:
    """The (cell, task) whose mean value is above chance by more than two standard errors."""
    answers = samples[samples["kind"] == "accuracy"]
    above = answers["value"].astype("float64") - answers["chance"].astype("float64")
    by_task = above.groupby([answers["cell_id"], answers["task"]], observed=True).agg(["mean", "sem", "size"])
    enough = by_task[(by_task["size"] > 1) & (by_task["mean"] > 0) & (by_task["mean"] > 2 * by_task["sem"])]
    return frozenset((str(cell), str(task)) for cell, task in enough.index)


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
