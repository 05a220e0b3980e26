"""The command `show`: one cell of a results folder or an archived study, with its status, its config and its rows."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from harness.arguments import add_results, finish, parser
from harness.console import say, stdout, styled, table
from harness.errors import ConfigError
from harness.results.cells import STATUS_PROBE
from harness.results.collect import dense_key, read_table, relate
from harness.results.kept import commit_of, config_of, read_cells, read_environments
from harness.results.rows import to_frame
from harness.results.store import Store

LISTED = 8  # names in a sentence that lets the user choose
# What tells the rows of a cell apart, in the order in which it is read.
PLACE = ["task", "metric", "site", "layer", "step_phase", "batch", "context", "execution", "engine", "variant"]
STATUS_STYLES = {
    "done": "green",
    "failed": "red",
    "oom": "red",
    "invalid": "red",
    "unsupported": "yellow",
    "running": "yellow",
}


@dataclass(frozen=True)
class Shown:
    """A cell as it is looked at. rows: with the columns of `harness.results.collect`. error: its traceback, if any."""

    name: str
    folder: Path
    status: Mapping[str, Any]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: pd.DataFrame
    error: str = ""


def load(results: Path, asked: str) -> Shown:
    """The cell of `results`, or of the study in it, that `asked` names: an id, a part of one, or a cell's folder.

    Raises `ConfigError` where no cell or several are meant.
    """
    store, study = Store(results), _study(results)
    live = store.cells()
    kept = [] if study is None else list(read_cells(study)["cell_id"])
    if not live and not kept:
        raise ConfigError(f"there are no cells in {results}: run one first, for example with `make run`")
    name = choose(Path(asked).name, [*live, *(name for name in kept if name not in live)], results)
    return _live(store, name, live) if name in live else _kept(study or results, name)


def choose(asked: str, names: Sequence[str], where: Path) -> str:
    """The one of these names that is meant: itself, or the only one that it is a part of."""
    if asked in names:
        return asked
    found = [name for name in names if asked in name]
    if len(found) == 1:
        return found[0]
    if found:
        more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
        raise ConfigError(f"{asked} is a part of {len(found)} cells: {', '.join(found[:LISTED])}{more}")
    near = difflib.get_close_matches(asked, names, n=3, cutoff=0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ConfigError(f"no cell in {where} is called {asked}{hint}")


def _study(results: Path) -> Path | None:
    """The archived study that this folder is, or holds."""
    return next((f for f in (results, results / "study") if (f / "cells.parquet").is_file()), None)


def _live(store: Store, name: str, names: Sequence[str]) -> Shown:
    """A cell's folder. Of the others only the dense ones with its key are read, for the comparison with dense."""
    view = store.view(name)
    key = dense_key(view.config)
    keys = {name: key}
    for other in names:
        if list(store.view(other).config.get("method") or ()) == ["dense"]:
            if dense_key(store.view(other).config) == key:
                keys[other] = key
    frames = []
    for one in (store.view(other) for other in keys):
        probes = one.probes() + ([STATUS_PROBE] if one.done(STATUS_PROBE) else [])
        frames += [one.read(probe) for probe in probes]
    rows = relate(pd.concat(frames, ignore_index=True) if frames else to_frame([]), keys)
    error = view.path / "error.txt"
    told = error.read_text(errors="replace") if error.exists() else ""
    own = rows[rows["cell_id"] == name].reset_index(drop=True)
    return Shown(name, view.path, view.status, view.config, view.environment, own, told)


def _kept(study: Path, name: str) -> Shown:
    cells = read_cells(study)
    line = cells[cells["cell_id"] == name].iloc[0]
    environments = read_environments(study)
    whole = read_table(study / "table.parquet")
    rows = whole[whole["cell_id"] == name].reset_index(drop=True)
    status = {key: line[key] for key in ("status", "message", "started", "ended") if pd.notna(line[key])}
    return Shown(name, study, status, config_of(line["config"], study), environments.get(line["environment"], {}), rows)


def flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested keys joined by dots: {"tasks": {"limit": 5}} -> {"tasks.limit": 5}. Empty mappings stay."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def written(value: Any) -> str:
    """A config's value as one would type it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(written(item) for item in value) or "none"
    return str(value)


def quantity(value: Any, stderr: Any = None) -> str:
    """A number, with its standard error if it has one: "20.81 ± 0.42"; empty where it is missing."""
    if pd.isna(value):
        return ""
    return f"{float(value):.4g}" + ("" if stderr is None or pd.isna(stderr) else f" ± {float(stderr):.2g}")


def brief(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that a first look asks for: no layers, no parts of a sum, no phase where all tokens are summed."""
    weights = rows["metric"].isin(["skipped_weights", "total_weights"]) | rows["metric"].str.endswith("_headroom")
    by_task = (rows["probe"] == "sparsity") & rows["task"].notna()
    whole = (
        rows["phase"].where(rows["phase"] == "decode", "all").fillna("all")
    )  # the tokens that the policy makes sparse
    parts = (rows["probe"] == "sparsity") & (rows["step_phase"] != whole)
    hidden = rows["layer"].notna() | weights.fillna(False) | by_task.fillna(False) | parts.fillna(False)
    return rows[~hidden]


def places(rows: pd.DataFrame) -> list[str]:
    """Of `PLACE`, the columns that tell these rows apart; task and metric always."""
    said = [name for name in PLACE if rows[name].notna().any()]
    return [name for name in said if name in ("task", "metric") or rows[name].nunique() > 1]


def print_cell(cell: Shown, everything: bool = False, console: Console | None = None) -> None:
    """Print one cell: the rows of `brief`, or all."""
    console = console or stdout()
    status = str(cell.status.get("status", "not run"))
    say(console, (cell.name, "bold"), "  ", (status, STATUS_STYLES.get(status, "")))
    if cell.status.get("message"):
        say(console, f"  {cell.status['message']}", style=STATUS_STYLES.get(status, ""))
    say(console, f"  {_when(cell.status)}{_where(cell)}", style="dim")
    say(console, f"  {cell.folder}", style="dim")
    console.print(config_table(cell.config))
    listed = cell.rows if everything else brief(cell.rows)
    for probe, rows in listed.groupby("probe", sort=False, dropna=False):
        console.print(rows_table(str(probe), rows))
    if len(listed) < len(cell.rows):
        say(
            console,
            f"and {len(cell.rows) - len(listed)} rows by layer, phase and the like: --all shows them",
            style="dim",
        )
    if cell.error:
        say(console, cell.error.rstrip(), style="red")


def _when(status: Mapping[str, Any]) -> str:
    if not status.get("started"):
        return ""
    if not status.get("ended"):
        return f"started {status['started']}"
    spent = pd.Timestamp(str(status["ended"])) - pd.Timestamp(str(status["started"]))
    return f"{status['started']}, took {int(spent.total_seconds())} s"


def _where(cell: Shown) -> str:
    facts = cell.rows[["device", "dtype"]].dropna()
    told = f", on {facts.iloc[0]['device']} in {facts.iloc[0]['dtype']}" if len(facts) else ""
    stored = cell.rows["weight_format"].dropna()
    told += f", {stored.iloc[0]} weights" if len(stored) else ""
    commit = commit_of(dict(cell.environment))
    return told + (f", at commit {commit[:10]}" if commit else "")


def config_table(config: Mapping[str, Any]) -> Table:
    """Every key that is set, sorted."""
    listing = table("config")
    listing.add_column("key", style="cyan", no_wrap=True)
    listing.add_column("value", overflow="fold")
    for key, value in sorted(flat(config).items()):
        if value is not None:
            listing.add_row(styled(key), styled(written(value)))
    return listing


def rows_table(probe: str, rows: pd.DataFrame) -> Table:
    """A probe's rows: what each is about, its value, unit and count, and dense beside it."""
    listing, about = table(probe), places(rows)
    for name in about:
        listing.add_column(name.replace("_", " "), overflow="fold")
    compared = rows["dense_value"].notna().any()
    for header in ("value", "unit", "n", *(("dense", "difference") if compared else ())):
        listing.add_column(header, justify="left" if header == "unit" else "right", no_wrap=True)
    for _, row in rows.iterrows():
        cells = ["" if pd.isna(row[name]) else str(row[name]) for name in about]
        cells += [quantity(row["value"], row["stderr"]), "" if pd.isna(row["unit"]) else row["unit"]]
        cells += ["" if pd.isna(row["n"]) else f"{row['n']:,}"]
        if compared:
            cells += [quantity(row["dense_value"]), quantity(row["difference"])]
        listing.add_row(*map(styled, cells))
    return listing


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code."""
    options = parser("show", "One cell: how it ended, its config and its rows.")
    options.add_argument("cell", help="its id, any part of it that no other has, or its folder")
    add_results(options)
    options.add_argument("--all", action="store_true", help="every row, those by layer and phase too")
    given = options.parse_args(arguments)
    return finish(lambda: print_cell(load(given.results, given.cell), given.all))
