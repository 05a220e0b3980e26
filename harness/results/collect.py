"""All cells' rows as one table, each beside its dense counterpart, and one line a cell for people to read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import ConfigError
from harness.files import guarded, place_errors, remove_drafts, write_atomic
from harness.reading import read_csv, read_parquet, typed
from harness.results.cells import STATUS_PROBE, SchemaError
from harness.results.identity import content_key, measured
from harness.results.once import once
from harness.results.rows import COLUMNS, to_frame, up_to_date
from harness.results.store import Store

# Config keys in which a cell and its dense counterpart may differ; all the others must be equal.
METHOD_KEYS = frozenset({"method", "sparsity", "scope", "phase", "dense_prefix", "calibration"})

# The coordinates of a fact within a cell.
FACT = [
    "probe",
    "layer",
    "site",
    "step_phase",
    "task",
    "split",
    "metric",
    "batch",
    "context",
    "dtype",
    "device",
    "limited",
]

# What collect adds to the columns of harness.results.rows.
DERIVED: dict[str, str] = {
    "dense_cell": "string",  # the cell that dense_value comes from
    "dense_value": "Float64",
    "difference": "Float64",  # value - dense_value
    "ratio": "Float64",  # value / dense_value
    "speedup": "Float64",  # dense time / time, only where bytes were really skipped: never for masked
}

SKIPPING = ("kernel", "dense_slice")  # executions whose time is a measurement of the scheme
COMPILED = ("dense_compiled", "kernel_compiled")  # of a compiled step: compared with one another, and with no eager one
MILLISECONDS = {"s": 1e3, "ms": 1.0, "us": 1e-3}  # in a unit of time

# The rows that the headline is made of, by metric name.
PERPLEXITY = "token_perplexity"  # of running text; lm-eval's own "perplexity" belongs to a task
BITS_PER_BYTE = "bits_per_byte"
ACCURACIES = ("acc", "exact_match")  # lm-eval's names, with or without ":<filter>"; the first that a task has
KL = "kl_to_dense"
AGREEMENT = "top1_agreement"
AGAINST_DENSE = "_minus_dense"  # suffix of a paired difference on the same items, with its own error
FLIPS = ("flips_right_to_wrong", "flips_wrong_to_right")  # shares of items, one row a task
TRUNCATED = "truncated"  # of a task or of running text: items that are longer than the model's maximum
ANSWER_TOKENS = "answer_tokens"  # of generated answers, one row a task
ACHIEVED = "achieved"
KV_BYTES, KV_BYTES_DENSE = "kv_bytes", "kv_bytes_dense"  # bytes of the KV cache that a token reads, and of dense
TIME_PER_TOKEN = "tpot_median"
TIME_TO_FIRST = "ttft_median"
TIME_RATIO = "time_ratio"  # time a token of the strongest dense run / time a token, paired by round
TIME_RATIO_ENGINE = "time_ratio_engine"  # the same to the strongest dense run of the same engine

CELL = [
    "cell_id",
    "model",
    "family",
    "activation",
    "weight_format",
    "method",
    "variant",
    "sparsity_requested",
    "scope",
    "phase",
    "dense_prefix",
    "needs",
    "needs_tokens",
    "calibration",
    "seed",
    "limited",
]


def dense_key(config: Mapping[str, Any]) -> str:
    """Equal for a cell and its dense counterpart: the config's digest without what belongs to the method."""
    return content_key({key: value for key, value in measured(config).items() if key not in METHOD_KEYS})


def collect(root: Path | str) -> pd.DataFrame:
    """Return the rows of all committed probes with the `DERIVED` columns; write them to `root`.

    Writes `root/table.parquet` and `root/table.csv`, each atomically. A value's dense counterpart is the
    same fact (and, for quality, the same number of items) in a `dense` cell whose config differs in
    `METHOD_KEYS` alone; for latency, the dense repeats interleaved in the same cell come first. A dense cell
    skips nothing, so its own phase policy does not matter, but one of the same policy is preferred. Raises
    `SchemaError` if a cell was written with other columns and `ConfigError` if there are no rows.
    """
    root = Path(root)
    if not Store(root).cells():
        raise ConfigError(f"there are no results in {root}: run a cell first")
    # Read and written in one go: of several commands on one folder, the last to collect has seen every cell.
    with place_errors(root), guarded(root / "cells" / ".guard"):
        table = relate(*read_rows(Store(root)))
        if table.empty:
            raise ConfigError(f"there are no results in {root}: run a cell first")
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        remove_drafts(root, "table.*")
        write_atomic(root / "table.parquet", buffer.getvalue())
        write_atomic(root / "table.csv", table.to_csv(index=False).encode())
    return table


def read_table(path: Path | str) -> pd.DataFrame:
    """Read a collected table (.parquet or .csv) typed as `collect` returned it; `SchemaError` on drift."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a table in it, such as {path / 'table.parquet'}")
    if not path.exists():
        raise ConfigError(f"there is no table {path}: run a cell first")
    frame = up_to_date(read_parquet(path) if path.suffix == ".parquet" else read_csv(path, low_memory=False))
    types = COLUMNS | DERIVED
    if list(frame.columns) != list(types):
        differing = sorted(set(frame.columns) ^ set(types)) or ["the order of the columns"]
        raise SchemaError(f"{path} has other columns than this version writes: {', '.join(differing)}")
    return typed(frame, types, path)


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """One line a cell, joining quality, achieved sparsity and latency. Takes what `collect` returned.

    Columns: the cell's identity, `status`, `message`; `perplexity`, `bits_per_byte`, `kl` (nats), `agreement`
    and `accuracy` (mean over tasks), each with `stderr:<name>` and `dense:<name>`; the same for each task as
    `acc:<task>`, `stderr:<task>`, `dense:<task>`; `truncated:<task>` (items that are longer than the model's maximum,
    perplexity's windows too; missing where there are none); `change` (mean paired difference in accuracy to dense) and
    `stderr:change`; `lost`, `won` and their sum `flips` (shares of answers that went from right to wrong and
    back, mean over tasks); `achieved_mlp` and `achieved_model` (over the tokens that the phase policy makes
    sparse); `kv_read` (of the bytes of the KV cache that dense attention reads for these tokens, the share that was);
    `tpot_ms`, `dense:tpot_ms` (interleaved with it, if it was) and `ttft_ms` (smallest batch and context;
    kernel before masked), `execution` and `speedup` (paired by round where that was measured), missing for masked
    execution. What was not measured is missing. Of one table it is computed once.
    """
    return _headline(table).copy()


@once
def _headline(table: pd.DataFrame) -> pd.DataFrame:
    table = table.reset_index(drop=True)
    lines = table.drop_duplicates("cell_id")[CELL].set_index("cell_id")
    lines["limited"] = table["limited"].fillna(False).groupby(table["cell_id"]).any()
    # Latency that can't be had (no kernel reads the weights) is one part of a cell, whose other parts are results.
    fine = table["status"] == "ok"
    part = (table["probe"] == "latency").fillna(False) & table["cell_id"].isin(table.loc[fine, "cell_id"].unique())
    broken = table[~fine & ~part].drop_duplicates("cell_id").set_index("cell_id")
    lines["status"] = broken["status"].reindex(lines.index, fill_value="ok")
    lines["message"] = broken["message"]

    rows = table[(table["status"] == "ok") & table["layer"].isna()]
    lines = _join_quality(lines, rows[rows["probe"] == "quality"])
    lines = _join_sparsity(lines, rows[rows["probe"] == "sparsity"])
    lines = _join_latency(lines, rows[rows["probe"] == "latency"])

    lines = lines.reset_index()
    texts = {"status": "string", "message": "string", "execution": "string"} | COLUMNS
    lines = lines.astype({name: texts.get(name, "Float64") for name in lines.columns})
    order = ["model", "phase", "_method", "method", "variant", "sparsity_requested"]
    lines = lines.assign(_method=lines["method"] != "dense").sort_values(order, na_position="first", kind="stable")
    return lines.drop(columns="_method").reset_index(drop=True)


def relate(rows: pd.DataFrame, dense_keys: Mapping[str, str]) -> pd.DataFrame:
    """Add the `DERIVED` columns. `dense_keys`: cell id -> `dense_key` of its config."""
    rows = rows.reset_index(drop=True)
    rows["_dense_key"] = rows["cell_id"].map(dense_keys).astype("string")
    # Quality of another number of items is another fact; repeats of a timing are not.
    rows["_items"] = rows["n"].where(rows["probe"] == "quality")
    rows["_compiled"] = rows["execution"].isin(COMPILED)
    measured = rows["value"].notna() & (rows["status"] == "ok")

    dense = rows[measured & rows["execution"].isin(["dense", "dense_compiled"]) & (rows["probe"] == "latency")]
    beside = _match(rows, dense, ["cell_id", "_compiled", *FACT])
    for policy in (["phase", "dense_prefix"], ["phase"], []):
        dense = rows[measured & (rows["method"] == "dense")]
        beside = beside.combine_first(_match(rows, dense, ["_dense_key", "_items", "_compiled", *FACT, *policy]))

    rows = rows.drop(columns=["_dense_key", "_items", "_compiled"]).join(beside[["dense_cell", "dense_value"]])
    rows["difference"] = rows["value"] - rows["dense_value"]
    rows["ratio"] = (rows["value"] / rows["dense_value"]).where(rows["dense_value"] != 0)
    timed = (rows["probe"] == "latency") & rows["unit"].isin(list(MILLISECONDS))
    timed &= rows["execution"].isin([*SKIPPING, "kernel_compiled"])
    rows["speedup"] = (rows["dense_value"] / rows["value"]).where(timed)
    return rows.astype(DERIVED)


def time_ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Of these rows, each step's paired ratio to the strongest dense run of its own engine: like with like.

    A cell from before that was a metric compared within one engine anyway, and gives what it has.
    """
    own = rows["metric"] == TIME_RATIO_ENGINE
    older = ~rows["cell_id"].isin(rows.loc[own, "cell_id"])
    return rows[own | ((rows["metric"] == TIME_RATIO) & older)]


def _match(rows: pd.DataFrame, dense: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """For each of `rows`, the id and value of the first of `dense` that agrees `on` these columns."""
    # Where several dense runs agree (a library's matmul and a tuned one) the strongest is the baseline.
    strength = dense["value"].where(dense["unit"].isin(list(MILLISECONDS)), -dense["value"])
    dense = dense.assign(_strength=strength).sort_values(["cell_id", "_strength"])
    dense = dense.drop_duplicates(on)[[*on, "cell_id", "value"]]
    dense = dense.set_axis([*on, "dense_cell", "dense_value"], axis=1)
    return rows[on].merge(dense, how="left", on=on)[["dense_cell", "dense_value"]]


def read_rows(store: Store) -> tuple[pd.DataFrame, dict[str, str]]:
    """The rows of all committed probes, and the `dense_key` of each cell."""
    frames, dense_keys = [], {}
    for name in store.cells():
        view = store.view(name)
        probes = [] if view.status.get("status") == "invalid" else view.probes()  # where one is NaN, no number counts
        probes += [STATUS_PROBE] if view.done(STATUS_PROBE) else []
        frames += [view.read(probe) for probe in probes]
        dense_keys[name] = dense_key(view.config)
    return (pd.concat(frames, ignore_index=True) if frames else to_frame([])), dense_keys


def _join_quality(lines: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    texts = {"perplexity": PERPLEXITY, "bits_per_byte": BITS_PER_BYTE, "kl": KL, "agreement": AGREEMENT}
    for name, metric in texts.items():
        text = _first(quality, metric)
        lines[name], lines[f"stderr:{name}"], lines[f"dense:{name}"] = (
            text["value"],
            text["stderr"],
            text["dense_value"],
        )
    for name, metric in zip(("lost", "won"), FLIPS):
        lines[name] = quality[quality["metric"] == metric].groupby("cell_id")["value"].mean()
    lines["flips"] = lines["lost"] + lines["won"]

    base = quality["metric"].str.replace(r":.*", "", regex=True)
    scored = quality[base.isin(ACCURACIES)].assign(_rank=base.map(dict(zip(ACCURACIES, (0, 1)))))
    scored = scored.sort_values(["task", "_rank"], kind="stable").drop_duplicates(["cell_id", "task"])
    change = scored[["cell_id", "task"]].assign(metric=scored["metric"] + AGAINST_DENSE)
    change = quality.merge(change, on=["cell_id", "task", "metric"])
    lines["accuracy"], lines["stderr:accuracy"] = _over_tasks(scored, "value"), _error_over_tasks(scored)
    lines["dense:accuracy"] = _over_tasks(scored, "dense_value")
    lines["change"], lines["stderr:change"] = _over_tasks(change, "value"), _error_over_tasks(change)
    for task, rows in scored.groupby("task"):
        rows = rows.set_index("cell_id")
        lines[f"acc:{task}"], lines[f"stderr:{task}"] = rows["value"], rows["stderr"]
        lines[f"dense:{task}"] = rows["dense_value"]
    cut = quality[(quality["metric"] == TRUNCATED) & (quality["value"] > 0)]
    for task, rows in cut.groupby("task"):
        lines[f"truncated:{task}"] = rows.set_index("cell_id")["value"]
    return lines


def _join_sparsity(lines: pd.DataFrame, sparsity: pd.DataFrame) -> pd.DataFrame:
    counted = sparsity["phase"].where(sparsity["phase"] == "decode", "all").fillna("all")
    sparsity = sparsity[sparsity["step_phase"] == counted]
    sparsity = sparsity.sort_values("task", na_position="first", kind="stable")  # held-out text before tasks
    for site in ("mlp", "model"):
        lines[f"achieved_{site}"] = _first(sparsity[sparsity["site"] == site], ACHIEVED)["value"]
    lines["kv_read"] = _first(sparsity, KV_BYTES)["value"] / _first(sparsity, KV_BYTES_DENSE)["value"]
    return lines


def _join_latency(lines: pd.DataFrame, latency: pd.DataFrame) -> pd.DataFrame:
    # In a method's cell the interleaved dense repeats are the baseline, not its own time.
    latency = latency[~latency["execution"].isin(COMPILED)]  # the headline is the eager step's
    own = (latency["execution"] != "dense") | (latency["method"] == "dense")
    # Nor are the repeats of its kernel at 0 %, which say what the kernel alone is worth.
    asked = latency["cell_id"].map(lines["sparsity_requested"])
    own &= (latency["sparsity_requested"] == asked) | (latency["sparsity_requested"].isna() & asked.isna())
    latency = latency[own.fillna(True)]
    rank = latency["execution"].map({"kernel": 0, "dense_slice": 1})
    scale = latency["unit"].map(MILLISECONDS).astype("Float64")
    latency = latency.assign(_rank=rank, ms=latency["value"] * scale)
    # Of several dense runs the fastest is what the model can do.
    latency = latency.sort_values(["batch", "context", "_rank", "ms"], kind="stable")
    time = _first(latency, TIME_PER_TOKEN)
    lines["tpot_ms"], lines["execution"] = time["ms"], time["execution"]
    lines["dense:tpot_ms"] = time["dense_value"] * time["unit"].map(MILLISECONDS).astype("Float64")
    # What else is shown is of that step: a cell has steps of several engines.
    step = ["cell_id", "execution", "engine", "batch", "context"]
    same = latency.merge(time.reset_index()[step].drop_duplicates(), on=step)
    lines["ttft_ms"] = _first(same, TIME_TO_FIRST)["ms"]
    paired = _first(same[same["execution"].isin(SKIPPING)], TIME_RATIO)["value"]
    lines["speedup"] = paired.reindex(lines.index).where(time["speedup"].reindex(lines.index).notna())
    lines["speedup"] = lines["speedup"].fillna(time["speedup"])
    return lines


def _first(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The first row of this metric of each cell, by cell id."""
    return rows[rows["metric"] == metric].drop_duplicates("cell_id").set_index("cell_id")


def _over_tasks(rows: pd.DataFrame, column: str) -> pd.Series:
    """Mean over a cell's tasks, missing if one of them is: a mean over other tasks is another number."""
    cells = rows[column].groupby(rows["cell_id"])
    return cells.mean().where(cells.count() == cells.size())


def _error_over_tasks(rows: pd.DataFrame) -> pd.Series:
    """Standard error of the mean over a cell's tasks, which are independent."""
    cells = (rows["stderr"] ** 2).groupby(rows["cell_id"])
    return (cells.sum() ** 0.5 / cells.size()).where(cells.count() == cells.size())
