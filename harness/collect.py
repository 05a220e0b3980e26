"""All cells' rows as one table, each beside its dense counterpart, and one line a cell for people to read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import ConfigError
from harness.rows import to_frame
from harness.store import STATUS_PROBE, SchemaError, Store, content_key, place_errors, write_atomic

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

# What collect adds to the columns of harness.rows.
DERIVED: dict[str, str] = {
    "dense_cell": "string",  # the cell that dense_value comes from
    "dense_value": "Float64",
    "difference": "Float64",  # value - dense_value
    "ratio": "Float64",  # value / dense_value
    "speedup": "Float64",  # dense time / time, only where bytes were really skipped: never for masked
}

SKIPPING = ("kernel", "dense_slice")  # executions whose time is a measurement of the scheme
TIME_UNITS = ("s", "ms", "us")

# The rows that the headline is made of, by metric name.
PERPLEXITY = "token_perplexity"  # of running text; lm-eval's own "perplexity" belongs to a task
BITS_PER_BYTE = "bits_per_byte"
ACCURACIES = ("acc", "exact_match")  # lm-eval's names, with or without ":<filter>"; the first that a task has
KL = "kl_to_dense"
AGREEMENT = "top1_agreement"
FLIPS = ("flips_right_to_wrong", "flips_wrong_to_right")  # shares of items, one row a task
ACHIEVED = "achieved"
TIME_PER_TOKEN = "tpot_median"
TIME_TO_FIRST = "ttft_median"
TIME_RATIO = "time_ratio"  # dense time a token / time a token, paired by round

CELL = [
    "cell_id",
    "model",
    "family",
    "activation",
    "method",
    "variant",
    "sparsity_requested",
    "scope",
    "phase",
    "dense_prefix",
    "seed",
    "limited",
]


def twin_key(config: Mapping[str, Any]) -> str:
    """Equal for a cell and its dense counterpart: the config's digest without what belongs to the method."""
    return content_key({key: value for key, value in config.items() if key not in METHOD_KEYS})


def collect(root: Path | str) -> pd.DataFrame:
    """Return the rows of all committed probes with the `DERIVED` columns; write them to `root`.

    Writes `root/table.parquet` and `root/table.csv`, each atomically. A value's dense counterpart is the
    same fact (and, for quality, the same number of items) in a `dense` cell whose config differs in
    `METHOD_KEYS` alone; for latency, the dense repeats interleaved in the same cell come first. A dense cell
    skips nothing, so its own phase policy does not matter, but one of the same policy is preferred. Raises
    `SchemaError` if a cell was written with other columns and `ConfigError` if there are no rows.
    """
    root = Path(root)
    table = relate(*_read(Store(root)))
    if table.empty:
        raise ConfigError(f"there are no results in {root}: run a cell first")
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    with place_errors(root):
        write_atomic(root / "table.parquet", buffer.getvalue())
        write_atomic(root / "table.csv", table.to_csv(index=False).encode())
    return table


def read_table(path: Path | str) -> pd.DataFrame:
    """Read a collected table (.parquet or .csv) typed as `collect` returned it; `SchemaError` on drift."""
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"there is no table {path}: run a cell first")
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, low_memory=False)
    types = {str(name): str(kind) for name, kind in _empty().dtypes.items()}
    if list(frame.columns) != list(types):
        differing = sorted(set(frame.columns) ^ set(types)) or ["the order of the columns"]
        raise SchemaError(f"{path} has other columns than this version writes: {', '.join(differing)}")
    return frame.astype(types)


def headline(table: pd.DataFrame) -> pd.DataFrame:
    """One line a cell, joining quality, achieved sparsity and latency. Takes what `collect` returned.

    Columns: the cell's identity, `status`, `message`; `perplexity`, `perplexity_dense`, `bits_per_byte`;
    `acc:<task>`, `stderr:<task>` and `dense:<task>` for each task, `accuracy` and `accuracy_dense` (means
    over tasks); `kl` (nats), `agreement`, `flips` (shares; flips is the mean over tasks of answers that went
    from right to wrong or back); `achieved_mlp` and `achieved_model` (over the tokens that the phase policy
    makes sparse); `tpot_ms`, `ttft_ms` (smallest batch and context), `execution` and `speedup` (paired by
    round where that was measured), missing for masked execution. What was not measured is missing.
    """
    lines = [_line(cell) for _, cell in table.groupby("cell_id", sort=False, dropna=False)]
    frame = pd.DataFrame(lines)
    order = ["method", "variant", "sparsity_requested"]
    frame["_dense_first"] = frame["method"] != "dense"
    return (
        frame.sort_values(["model", "phase", "_dense_first", *order], na_position="first", kind="stable")
        .drop(columns="_dense_first")
        .reset_index(drop=True)
    )


def relate(rows: pd.DataFrame, twins: Mapping[str, str]) -> pd.DataFrame:
    """Add the `DERIVED` columns. `twins`: cell id -> `twin_key` of its config."""
    rows = rows.reset_index(drop=True)
    rows["_twin"] = rows["cell_id"].map(twins).astype("string")
    # Quality of another number of items is another fact; repeats of a timing are not.
    rows["_items"] = rows["n"].where(rows["probe"] == "quality")
    measured = rows["value"].notna() & (rows["status"] == "ok")

    dense = rows[measured & (rows["execution"].fillna("") == "dense") & (rows["probe"] == "latency")]
    found = _match(rows, dense, ["cell_id", *FACT])
    for policy in (["phase", "dense_prefix"], []):
        dense = rows[measured & (rows["method"] == "dense")]
        found = found.combine_first(_match(rows, dense, ["_twin", "_items", *FACT, *policy]))

    rows = rows.drop(columns=["_twin", "_items"]).join(found[["dense_cell", "dense_value"]])
    rows["difference"] = rows["value"] - rows["dense_value"]
    rows["ratio"] = (rows["value"] / rows["dense_value"]).where(rows["dense_value"] != 0)
    timed = (rows["probe"] == "latency") & rows["unit"].isin(TIME_UNITS) & rows["execution"].isin(SKIPPING)
    rows["speedup"] = (rows["dense_value"] / rows["value"]).where(timed)
    return rows.astype(DERIVED)


def _match(rows: pd.DataFrame, dense: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """For each of `rows`, the id and value of the first of `dense` that agrees `on` these columns."""
    dense = dense.sort_values("cell_id").drop_duplicates(on)[[*on, "cell_id", "value"]]
    dense = dense.set_axis([*on, "dense_cell", "dense_value"], axis=1)
    return rows[on].merge(dense, how="left", on=on)[["dense_cell", "dense_value"]]


def _read(store: Store) -> tuple[pd.DataFrame, dict[str, str]]:
    frames, twins = [], {}
    for name in store.cells():
        view = store.view(name)
        probes = view.probes() + ([STATUS_PROBE] if view.done(STATUS_PROBE) else [])
        frames += [view.read(probe) for probe in probes]
        twins[name] = twin_key(view.config)
    return (pd.concat(frames, ignore_index=True) if frames else to_frame([])), twins


def _empty() -> pd.DataFrame:
    return relate(to_frame([]), {})


def _line(cell: pd.DataFrame) -> dict[str, Any]:
    first = cell.iloc[0]
    line: dict[str, Any] = {name: first[name] for name in CELL}
    line["limited"] = bool(cell["limited"].any())
    broken = cell[cell["status"] != "ok"]
    line["status"] = "ok" if broken.empty else broken.iloc[0]["status"]
    line["message"] = pd.NA if broken.empty else broken.iloc[0]["message"]
    cell = cell[(cell["status"] == "ok") & cell["layer"].isna()]

    quality = cell[cell["probe"] == "quality"]
    text = _one(quality, PERPLEXITY)
    line["perplexity"], line["perplexity_dense"] = text["value"], text["dense_value"]
    line["bits_per_byte"] = _one(quality, BITS_PER_BYTE)["value"]
    line |= _accuracies(quality)
    line["kl"] = _one(quality, KL)["value"]
    line["agreement"] = _one(quality, AGREEMENT)["value"]
    flips = quality[quality["metric"].isin(FLIPS)].groupby("task")["value"].sum()
    line["flips"] = flips.mean() if len(flips) else pd.NA

    tokens = "decode" if str(line["phase"]) == "decode" else "all"
    sparsity = cell[(cell["probe"] == "sparsity") & (cell["step_phase"] == tokens)]
    sparsity = sparsity.sort_values("task", na_position="first", kind="stable")  # held-out text before tasks
    for site in ("mlp", "model"):
        line[f"achieved_{site}"] = _one(sparsity[sparsity["site"] == site], ACHIEVED)["value"]

    timed = cell[cell["probe"] == "latency"]
    if (
        str(line["method"]) != "dense"
    ):  # the dense repeats interleaved in the cell are its baseline, not its time
        timed = timed[timed["execution"] != "dense"]
    timed = timed.sort_values(["batch", "context"], kind="stable")
    time = _one(timed, TIME_PER_TOKEN)
    line["tpot_ms"], line["execution"], line["speedup"] = _ms(time), time["execution"], time["speedup"]
    if not pd.isna(line["speedup"]):
        paired = _one(timed[timed["execution"] == line["execution"]], TIME_RATIO)["value"]
        line["speedup"] = line["speedup"] if pd.isna(paired) else paired
    line["ttft_ms"] = _ms(_one(timed, TIME_TO_FIRST))
    return line


def _accuracies(quality: pd.DataFrame) -> dict[str, Any]:
    line: dict[str, Any] = {}
    base = quality["metric"].str.replace(r":.*", "", regex=True)
    scored = quality[base.isin(ACCURACIES)].assign(_rank=base.map(dict(zip(ACCURACIES, (0, 1), strict=True))))
    scored = scored.sort_values(["task", "_rank"], kind="stable").drop_duplicates("task")
    for _, row in scored.iterrows():
        line[f"acc:{row['task']}"] = row["value"]
        line[f"stderr:{row['task']}"] = row["stderr"]
        line[f"dense:{row['task']}"] = row["dense_value"]
    line["accuracy"] = scored["value"].mean() if len(scored) else pd.NA
    line["accuracy_dense"] = scored["dense_value"].mean(skipna=False) if len(scored) else pd.NA
    return line


def _one(rows: pd.DataFrame, metric: str) -> Mapping[str, Any]:
    """The first row of this metric, or missing values."""
    rows = rows[rows["metric"] == metric]
    return dict.fromkeys(rows.columns, pd.NA) if rows.empty else rows.iloc[0].to_dict()


def _ms(row: Mapping[str, Any]) -> Any:
    return (
        row["value"]
        if pd.isna(row["unit"])
        else row["value"] * {"s": 1e3, "ms": 1.0, "us": 1e-3}[row["unit"]]
    )
