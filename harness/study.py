"""What the study's claims may look at: rows that count, per-item samples, and cells paired with their counterparts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness import stats
from harness.collect import ACCURACIES, CELL, headline
from harness.store import Store

SKIPS = 0.005  # least achieved sparsity of a cell that is more than a pretence
EQUAL_SPARSITY = 0.02  # a counterpart may skip so much less and still count as equally sparse

BASELINES = ("dense", "dense_slice", "random")
COUNTERPARTS = {"relullama-7b": "llama-2-7b", "prosparse-7b": "llama-2-7b"}  # where the name does not say it
POLICY = ["scope", "phase", "dense_prefix", "seed", "length"]  # in which compared cells are alike
SAMPLES = ["cell_id", "task", "item", "kind", "value", "chance", "tokens"]


class MissingEvidence(Exception):
    """What a claim lacks, in words."""


@dataclass(frozen=True)
class Study:
    """What claims may look at.

    rows: rows that count. lines: their headline, one a cell, with `length` (tokens of a text window). left_out: cells
    that only pretend to be sparse. counted: cells that were counted to skip something. items: (cell, kind) -> value by
    (task, item), kind accuracy or text (nats a token). room: (cell, task) -> dense accuracy above chance, if there is
    any. twins: (cell, kind) -> its dense cell.
    """

    rows: pd.DataFrame
    lines: pd.DataFrame
    left_out: tuple[str, ...]
    counted: frozenset[str]
    items: dict[tuple[str, str], pd.Series]
    room: dict[tuple[str, str], float]
    twins: dict[tuple[str, str], str] = field(default_factory=dict)

    def select(self, *methods: str) -> pd.DataFrame:
        """Lines of methods by name, alone or in a nest; of all but baselines if none is named."""
        keep = [
            bool(names & set(methods)) if methods else not names & set(BASELINES)
            for names in map(set, self.lines["method"].str.split("+"))
        ]
        return self.lines[np.array(keep, dtype=bool)]

    def loss(self, cell: str, kind: str) -> pd.Series | None:
        """Loss against the dense twin by (task, item), above zero is worse; informative tasks only.

        None without samples of both, or where nothing counted that the cell skips anything.
        """
        twin = self.twins.get((cell, kind))
        if twin is None or cell not in self.counted or (cell, kind) not in self.items or (twin, kind) not in self.items:
            return None
        loss = self.items[cell, kind] - self.items[twin, kind]
        loss = (loss if kind == "text" else -loss).dropna()
        if kind == "accuracy":
            tasks = loss.index.get_level_values("task")
            loss = loss[[(twin, task) in self.room for task in tasks]]
        return loss if len(loss) else None


def study_of(table: pd.DataFrame, samples: pd.DataFrame, limited: bool = False) -> Study:
    """What counts as evidence of a collected table and of `read_samples`. limited: take smoke runs in."""
    rows = table[(table["source"] == "measured") & (table["status"] == "ok")]
    rows = rows if limited else rows[~rows["limited"].fillna(False)]
    quality = rows[rows["probe"] == "quality"]
    samples = samples.merge(quality[["cell_id", "task"]].drop_duplicates(), on=["cell_id", "task"])
    items = {
        (str(cell), str(kind)): group.set_index(["task", "item"])["value"]
        for (cell, kind), group in samples.groupby(["cell_id", "kind"], observed=True)
    }
    lines = headline(rows) if len(rows) else pd.DataFrame(columns=CELL)
    texts = samples[samples["kind"] == "text"].groupby("cell_id", observed=True)["tokens"].max() + 1
    lines["length"] = lines["cell_id"].map(texts).astype("Float64")
    decode = (lines["phase"] == "decode") & (lines["method"] != "dense") if len(lines) else []
    lines["length"] = lines["length"].where(~np.asarray(decode, dtype=bool), lines["length"] * 2)  # half is prompt
    achieved = lines.reindex(columns=["achieved_mlp", "achieved_model"]).astype("Float64").max(axis=1)
    pretends = ((lines["sparsity_requested"] > 0) & (achieved < SKIPS)).fillna(False).astype(bool)
    left_out = tuple(lines.loc[pretends, "cell_id"])
    counted = frozenset(lines.loc[(achieved >= SKIPS).fillna(False).astype(bool), "cell_id"])
    kind_of = dict.fromkeys(ACCURACIES, "accuracy") | {"nll": "text"}
    quality = quality.assign(kind=quality["metric"].str.replace(r":.*", "", regex=True).map(kind_of))
    related = quality.dropna(subset=["kind", "dense_cell"])
    twins = {(row.cell_id, row.kind): row.dense_cell for row in related.itertuples()}
    return Study(rows, lines[~pretends], left_out, counted, items, _room(samples), twins)


def _room(samples: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Mean value above chance by (cell, task), where it is more than two standard errors."""
    room = {}
    for (cell, task), group in samples[samples["kind"] == "accuracy"].groupby(["cell_id", "task"], observed=True):
        above = group["value"].to_numpy(dtype=float) - group["chance"].to_numpy(dtype=float)
        if len(above) > 1 and above.mean() > 2 * stats.standard_error(above) and above.mean() > 0:
            room[str(cell), str(task)] = float(above.mean())
    return room


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


def matched_models(study: Study) -> Iterator[tuple[str, str]]:
    """(SwiGLU model, ReLU counterpart): the control that was trained alike where there is one, else the base."""
    kinds = study.lines.drop_duplicates("model").set_index("model")["activation"].fillna("").str.lower()
    for name, activation in kinds.items():
        if "relu" not in activation:
            continue
        base = COUNTERPARTS.get(str(name), str(name).rpartition("-")[0])
        for candidate in (f"{base}-control", base):
            if candidate in kinds.index and "relu" not in kinds[candidate]:
                yield candidate, str(name)
                break


def equally_sparse(study: Study) -> pd.DataFrame:
    """Cells of a SwiGLU model beside the ReLU cell of the same method that skips as much of the MLPs, or just more.

    Columns: swiglu, relu (cells), pair (models), method, achieved (of the SwiGLU cell), length. A ReLU model's natural
    zeros come on top of what is asked for, so cells are matched by what was achieved: never by less than
    `EQUAL_SPARSITY`.
    """
    lines = study.select()
    if "achieved_mlp" not in lines:
        return pd.DataFrame(columns=["swiglu", "relu", "pair", "method", "achieved", "length"])
    lines = lines[lines["achieved_mlp"] > 10 * SKIPS].assign(variant=lines["variant"].fillna(""))
    found = []
    for swiglu, relu in matched_models(study):
        parts = [lines[lines["model"] == model] for model in (swiglu, relu)]
        both = parts[0].merge(parts[1], on=["method", "variant", *POLICY], suffixes=("", "_relu"))
        both = both[both["achieved_mlp_relu"] >= both["achieved_mlp"] - EQUAL_SPARSITY]
        both = both.sort_values("achieved_mlp_relu").drop_duplicates("cell_id")
        found += [
            {
                "swiglu": line.cell_id,
                "relu": line.cell_id_relu,
                "pair": f"{swiglu} and {relu}",
                "method": f"{line.method} {line.variant} {line.phase}",
                "achieved": float(line.achieved_mlp),
                "length": line.length,
            }
            for line in both.itertuples()
        ]
    return pd.DataFrame(found, columns=["swiglu", "relu", "pair", "method", "achieved", "length"])


def gaps(study: Study, pairs: pd.DataFrame, worse: str, better: str, kind: str) -> pd.DataFrame:
    """Loss of the worse cell minus loss of the better one, items x rows of `pairs`; what is not paired is left out.

    Windows of another length are other items: of several lengths, the one that most pairs have counts.
    """
    lengths = pairs["length"].mode()
    if kind == "text" and len(lengths):
        pairs = pairs[pairs["length"] == lengths.iloc[0]]
    columns = {}
    for index, pair in pairs.iterrows():
        ours, theirs = study.loss(pair[worse], kind), study.loss(pair[better], kind)
        if ours is not None and theirs is not None:
            columns[index] = (ours - theirs).dropna()
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


# ------------------------------------------------------------------------------------------------ reading


def read_samples(root: Path | str) -> pd.DataFrame:
    """Per-item values of every cell of a results folder, with the columns `SAMPLES`.

    task: the perplexity probe's or lm-eval's; item: a window's number or "<part>/<document>"; kind: text (value in
    nats/token, of `tokens` scored tokens) or accuracy (value 0 or 1, beside `chance`). Where a folder holds no cells (a
    committed study), they are read from its samples.parquet.
    """
    root = Path(root)
    store = Store(root)
    if not store.cells() and (root / "samples.parquet").exists():
        return pd.read_parquet(root / "samples.parquet")[SAMPLES]
    found = []
    for cell in store.cells():
        view = store.view(cell)
        for probe in view.probes():
            if probe == "perplexity":
                frame = view.samples(probe)
                value = frame["nll"] / frame["tokens"]
                facts = {"task": "perplexity", "item": frame["window"].astype(str), "kind": "text", "chance": 0.0}
                found.append(frame.assign(cell_id=cell, value=value, **facts)[SAMPLES])
            elif probe.startswith("quality-"):
                frame = _answers(view.samples(probe))
                item = frame["task"] + "/" + frame["doc_id"].astype(str)
                facts = {"kind": "accuracy", "task": probe.removeprefix("quality-"), "tokens": 0, "item": item}
                found.append(frame.assign(cell_id=cell, **facts)[SAMPLES])
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=SAMPLES)


def _answers(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a document: the first of `ACCURACIES` that the task has, by its first filter; and chance."""
    base = frame["metric"].str.partition(":")[0]
    rank = base.map({name: place for place, name in enumerate(ACCURACIES)})
    frame = frame.assign(rank=rank)[rank.notna()]
    frame = frame.sort_values("rank", kind="stable").drop_duplicates(["task", "doc_id"])
    chance = np.where(frame["choices"] > 0, 1 / frame["choices"].clip(lower=1), 0.0)
    return frame.assign(chance=chance)
