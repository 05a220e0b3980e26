"""The row: one fact in one line, measured or published, with its unit, its count and its source."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from harness.errors import NotANumberError

SCHEMA_VERSION = 2

# Column -> pandas dtype. Long format: the identity of the cell, then what was measured, then the value.
COLUMNS: dict[str, str] = {
    "cell_id": "string",
    "model": "string",
    "family": "string",
    "activation": "string",
    "method": "string",  # nested methods joined by "+", outermost first: "relu2+cett"
    "variant": "string",  # the method's hyper-parameters that differ from its defaults: "allocation=greedy"
    "sparsity_requested": "Float64",
    "scope": "string",  # native (the method's own sites) | model (of all block weight bytes) | achieved (that, counted)
    "phase": "string",  # which tokens are sparse: all | decode
    "dense_prefix": "Int64",  # tokens at the start of a prompt that stay dense
    "needs": "string",  # what the cell's methods had to be given: nothing | calibration | training
    "needs_tokens": "Int64",  # tokens of text that they learnt from (calibration) or were trained on
    "calibration": "string",  # the text that they learnt from, by name and hash of its tokens: "coqa 0123456789ab"
    "probe": "string",  # quality | sparsity | latency | predictivity
    "layer": "Int64",  # missing = summed over layers
    "site": "string",  # a site, a projection, or the totals "mlp" and "model"
    "step_phase": "string",  # the tokens that the value is about: prefill | decode | all
    "task": "string",
    "split": "string",  # which split of the data was scored
    "metric": "string",
    "value": "Float64",
    "stderr": "Float64",
    "n": "Int64",  # how many items, tokens or repeats the value rests on
    "unit": "string",
    "execution": "string",  # masked | kernel | dense_slice | dense; a compiled step: kernel_compiled | dense_compiled
    "engine": "string",  # what launched the timed step: eager | graph, chained (CUDA) | fused (CPU) | compiled
    "batch": "Int64",
    "context": "Int64",  # latency: tokens already in the KV cache; perplexity: tokens a window
    "dtype": "string",  # in which it was computed
    "weight_format": "string",  # of the blocks' projections: float32, int4-g32, "Q4_K_M as bfloat16" (made of that)
    "device": "string",
    "seed": "Int64",
    "limited": "boolean",  # of a smoke run (harness.results.limited): never drawn as a result
    "source": "string",  # measured | published
    "paper": "string",
    "table": "string",
    "status": "string",  # ok | failed | unsupported | oom | invalid
    "message": "string",
}

LATER = ("needs", "needs_tokens", "calibration", "weight_format")  # columns that stored tables may be older than

# Methods that settle by themselves how much they skip -> what their variant has in it then.
SETTLED = {"cett": "cett=", "lte": ""}

REQUIRED = ("metric", "unit", "n", "source", "status")


class RowError(ValueError):
    """A row without a unit, a count or a source: a defect of the probe that made it."""


def short_device(device: str) -> str:
    """NVIDIA H100 80GB HBM3 -> H100; of a CPU that it is one."""
    gpu = re.search(r"\b([A-Z]+\d+\w*)\b", device.replace("NVIDIA", ""))
    return "CPU" if device.startswith("cpu") or gpu is None else gpu[1]


OF_ALL = ("model", "achieved")  # scopes whose requested sparsity is of all block weights


def of_oracles(frame: pd.DataFrame) -> set[str]:
    """Ids of the cells that say of themselves that they read what no deployable method knows."""
    told = frame["message"].fillna("").str.startswith("oracle:")
    return set(frame.loc[told, "cell_id"])


GPU_NEIGHBOURS = "other processes on the GPU"  # in the message of what was timed beside them


def no_speed(frame: pd.DataFrame) -> pd.Series:
    """Which rows time something else than a method on a GPU: bool. They are kept, and no table or claim takes them.

    Steps that a host launched one operation at a time say how fast the host is (of a 135M model on an H100 such a step
    takes 50 ms, of which 0.5 ms are the GPU's); those of a GPU shared with other processes, how it takes turns.
    """
    if not {"engine", "device", "message"} <= set(frame):
        return pd.Series(False, frame.index)
    on_gpu = ~frame["device"].astype("string").fillna("cpu").str.startswith("cpu")
    shared = frame["message"].astype("string").str.contains(GPU_NEIGHBOURS, regex=False).fillna(False)
    return (((frame["engine"] == "eager") | shared) & on_gpu).fillna(False).astype(bool)


# "int4-g32", and "Q4_1 as int4-g32" where the model's own file holds other bits; and how such a model is called.
QUANTISED = re.compile(r"(?:.* as )?int(?P<bits>\d+)-g(?P<group>\d+)")
_NAMED = r"-int\d+-g\d+$"


def quantised(frame: pd.DataFrame) -> pd.Series:
    """Which rows or lines are of quantised weights: bool. They are another model than that of their name in 16 bits."""
    return frame["weight_format"].astype("string").str.fullmatch(QUANTISED.pattern).fillna(False).astype(bool)


def in_16_bits(models: pd.Series) -> pd.Series:
    """Names of models without their quantised format: smollm2-135m-int8-g32 -> smollm2-135m."""
    return models.astype("string").str.replace(_NAMED, "", regex=True)


def make_row(**facts: Any) -> dict[str, Any]:
    """Return one row with every column; unknown columns and missing unit, count or source raise `RowError`.

    A value that is NaN raises `NotANumberError`.
    """
    unknown = facts.keys() - COLUMNS.keys()
    if unknown:
        raise RowError(f"unknown column(s) {sorted(unknown)}")
    row = dict.fromkeys(COLUMNS) | {"source": "measured", "status": "ok"} | facts
    if row["status"] == "ok":
        missing = [name for name in REQUIRED if row[name] is None or row[name] == ""]
        if missing:
            raise RowError(f"row {row['metric']!r} lacks {missing}")
        if row["value"] is None:
            raise RowError(f"row {row['metric']!r} has no value")
        if isinstance(row["value"], float) and math.isnan(row["value"]):
            raise NotANumberError(f"{row['metric']} of the {row['probe']} probe is NaN, not a number")
    return row


def with_engine(frame: pd.DataFrame) -> pd.DataFrame:
    """A stored table as it is, or with the column `engine` if it is from before there was one.

    Then compiled steps had executions of their own, and on a CPU all others were eager. On a GPU a cell was either
    eager, with an ideal slice beside its kernels, or all of it ran in CUDA graphs, without one.
    """
    if "engine" in frame.columns or not {"cell_id", "probe", "variant", "execution", "batch", "device"} <= set(frame):
        return frame
    timed = (frame["probe"] == "latency") & frame["batch"].notna()
    compiled = timed & frame["execution"].isin(["dense_compiled", "kernel_compiled"])
    tuned, slices = frame["variant"] == "tuned GEMV", frame["execution"] == "dense_slice"
    graphs = timed & ~frame["device"].astype("string").str.startswith("cpu").fillna(True)
    graphs &= frame["cell_id"].isin(frame.loc[tuned.fillna(False), "cell_id"])
    graphs &= ~frame["cell_id"].isin(frame.loc[slices.fillna(False), "cell_id"])
    engine = pd.Series("eager", index=frame.index, dtype="string").mask(graphs, "graph").mask(compiled, "compiled")
    engine = engine.where(timed)
    frame = frame.copy()
    frame.insert(frame.columns.get_loc("execution") + 1, "engine", engine)
    return frame


def without_unread_requests(frame: pd.DataFrame) -> pd.DataFrame:
    """A stored table whose methods of `SETTLED` name no sparsity: rows from before named one that nothing had read."""
    if not {"method", "variant", "sparsity_requested"} <= set(frame):
        return frame
    options = frame["variant"].astype("string").fillna("")
    unread = pd.Series(False, index=frame.index)
    for method, mark in SETTLED.items():
        unread |= (frame["method"] == method).fillna(False) & options.str.contains(mark, regex=False)
    asked = pd.to_numeric(frame["sparsity_requested"], errors="coerce")  # in a damaged file they may be of any type
    unread &= asked.gt(0).fillna(False)
    if not unread.any():
        return frame
    return frame.assign(sparsity_requested=frame["sparsity_requested"].mask(unread))


def up_to_date(frame: pd.DataFrame) -> pd.DataFrame:
    """A stored table with the columns and the words of today.

    `engine` is as it was, columns of `LATER` are missing where the table can't say, and a request that nothing read is
    missing too.
    """
    frame = without_unread_requests(with_engine(frame))
    order = list(COLUMNS)
    for name in LATER:
        before = order[order.index(name) - 1]
        if name not in frame.columns and before in frame.columns:
            frame = frame.copy()
            frame.insert(frame.columns.get_loc(before) + 1, name, pd.Series(pd.NA, frame.index, dtype=COLUMNS[name]))
    return frame


def to_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a typed table; the same columns in the same order whatever the rows hold."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS))
    return frame.astype(COLUMNS)
