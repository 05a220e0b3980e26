"""Per-item values of cells: what each answer and each window of text was worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype, is_string_dtype, union_categoricals

from harness.errors import DamagedError
from harness.reading import read_parquet, typed
from harness.results.cells import CellView
from harness.results.collect import ACCURACIES
from harness.results.store import Store

SAMPLES = {  # column -> dtype of the per-item table; millions of lines, so that texts are told once
    "cell_id": "category",
    "task": "category",
    "item": "category",
    "kind": "category",
    "value": "float32",
    "chance": "float32",
    "tokens": "int32",
}
TEXTS = [name for name, kind in SAMPLES.items() if kind == "category"]


def read_samples(root: Path | str) -> pd.DataFrame:
    """Per-item values of every cell of a results folder, with the columns `SAMPLES`.

    task: the perplexity probe's or lm-eval's; item: a window's number or "<part>/<document>"; kind: text (value in
    nats/token, of `tokens` scored tokens) or accuracy (value 0 or 1, beside `chance`). Where a folder holds no cells (a
    committed study), they are read from its samples.parquet.
    """
    root = Path(root)
    store = Store(root)
    if not store.cells() and (root / "samples.parquet").exists():
        return read_parquet(root / "samples.parquet", kinds=SAMPLES)
    tables = []
    for cell in store.cells():
        view = store.view(cell)
        for probe in view.probes():
            if probe == "perplexity":
                frame = _checked(view, probe, texts=(), numbers=("nll", "tokens", "window"))
                value = frame["nll"] / frame["tokens"]
                facts = {"task": "perplexity", "item": frame["window"].astype(str), "kind": "text", "chance": 0.0}
                tables.append(
                    typed(frame.assign(cell_id=cell, value=value, **facts)[list(SAMPLES)], SAMPLES, view.path)
                )
            elif probe.startswith("quality-"):
                frame = answers(_checked(view, probe, ("task", "metric"), ("doc_id", "choices", "value")))
                item = frame["task"] + "/" + frame["doc_id"].astype(str)
                facts = {"kind": "accuracy", "task": probe.removeprefix("quality-"), "tokens": 0, "item": item}
                tables.append(typed(frame.assign(cell_id=cell, **facts)[list(SAMPLES)], SAMPLES, view.path))
    return stack(tables)


def stack(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Per-item tables one below the other; `SAMPLES` keep their dtypes."""
    frames = [frame for frame in frames if len(frame)]
    if not frames:
        return pd.DataFrame(columns=list(SAMPLES)).astype(SAMPLES)
    texts = {name: union_categoricals([frame[name] for frame in frames]).remove_unused_categories() for name in TEXTS}
    numbers_ = {name: np.concatenate([frame[name] for frame in frames]) for name in SAMPLES if name not in TEXTS}
    return pd.DataFrame(texts | numbers_)[list(SAMPLES)]


def _checked(cell: CellView, probe: str, texts: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    """A probe's per-item table, if these columns are what they are to be. Raises `DamagedError`."""
    frame = cell.samples(probe)
    wrong = [name for name in texts if name not in frame or not is_string_dtype(frame[name])]
    wrong += [name for name in numbers if name not in frame or not is_numeric_dtype(frame[name])]
    if wrong:
        raise DamagedError(f"the per-item table of {probe} in {cell.path} has no good {', '.join(wrong)}")
    plain = pd.Series([""]).dtype  # of texts in every table: those of other types can't be stacked
    return frame.assign(**{name: frame[name].astype("string").astype(plain) for name in texts})


def answers(frame: pd.DataFrame) -> pd.DataFrame:
    """One line a document: the first of `ACCURACIES` that the task has, by its first filter; and chance."""
    base = frame["metric"].astype("string").str.replace(r":.*", "", regex=True)  # partition knows no empty table
    rank = base.map({name: place for place, name in enumerate(ACCURACIES)})
    frame = frame.assign(rank=rank)[rank.notna()]
    frame = frame.sort_values("rank", kind="stable").drop_duplicates(["task", "doc_id"])
    chance = np.where(frame["choices"] > 0, 1 / frame["choices"].clip(lower=1), 0.0)
    return frame.assign(chance=chance)
