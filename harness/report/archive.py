"""A study in one folder, to be committed: `python -m harness archive results [more folders] --to results/study`.

    table.parquet    every row of every cell, with the columns of `harness.results.collect`
    table.csv[.gz]   the same without the rows by layer; compressed where it would be large
    samples.parquet  per-item values, with the columns `harness.results.samples.SAMPLES`
    claims.csv       the verdicts
    cells.parquet    of each cell: status, when it ran, its resolved config (JSON), the key of its environment
    environment.json key -> environment of the machines that the cells ran on
    study.json       commits, counts, sha256 and size of the other files

The folders that go in are results folders or such archives, so that a study can be done in several sittings on several
machines. Of a cell that is in two of them the finished one counts, and of two finished ones the later. Failed
cells are left out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from harness import claims
from harness.arguments import finish
from harness.arguments import parser as arguments_of
from harness.console import say, stdout
from harness.errors import ConfigError, DamagedError
from harness.files import place_errors, write_atomic
from harness.results.collect import dense_key, read_rows, read_table, relate
from harness.results.identity import content_key
from harness.results.kept import CELLS, commit_of, config_of, read_cells, read_environments
from harness.results.rows import COLUMNS, SCHEMA_VERSION
from harness.results.samples import TEXTS, read_samples, stack
from harness.results.store import Store

ENDED = ("done", "unsupported")  # what failed is no result: the next sitting runs it again
LARGE = 5 << 20  # bytes from which on the CSV is compressed


@dataclass(frozen=True)
class Part:
    """What one folder holds: rows, `harness.results.samples.SAMPLES`, `CELLS`, and environments by key."""

    rows: pd.DataFrame
    samples: pd.DataFrame
    cells: pd.DataFrame
    environments: dict[str, Any]


def read(root: Path) -> Part:
    """A results folder, or an archive. Raises `ConfigError` where it is neither."""
    store = Store(root)
    if store.cells():
        rows, _ = read_rows(store)
        lines, environments = [], {}
        for name in store.cells():
            view = store.view(name)
            status = {key: view.status.get(key) for key in ("status", "message", "started", "ended")}
            # The command names folders and workers; what was run is the config.
            place = {key: value for key, value in view.environment.items() if key != "command"}
            key = content_key(place)[:12]
            environments[key] = place
            config = json.dumps(view.config, sort_keys=True)
            lines.append({"cell_id": name, "environment": key, "config": config} | status)
        cells = pd.DataFrame(lines, columns=CELLS).astype("string")
        return Part(rows, read_samples(root), cells, environments)
    if not (root / "cells.parquet").exists():
        raise ConfigError(f"{root} holds neither cells nor an archived study")
    cells = read_cells(root)
    environments = read_environments(root)
    if lacking := sorted(set(cells["environment"].dropna()) - set(environments)):
        raise DamagedError(f"{root / 'environment.json'} can't be read: it lacks {', '.join(lacking)}")
    return Part(read_table(root / "table.parquet")[list(COLUMNS)], read_samples(root), cells, environments)


def merge(parts: Sequence[Part]) -> Part:
    """Their whole cells together. Those that failed or are still running are left out."""
    every = pd.concat([part.cells.assign(part=index) for index, part in enumerate(parts)], ignore_index=True)
    every = every[every["status"].isin(ENDED)]
    every = every.assign(done=every["status"] == "done")
    every = every.sort_values(["done", "ended"], kind="stable", na_position="first")
    cells = every.drop_duplicates("cell_id", keep="last").sort_values("cell_id")
    kept = [set(cells.loc[cells["part"] == index, "cell_id"]) for index in range(len(parts))]
    rows = [part.rows[part.rows["cell_id"].isin(own)] for part, own in zip(parts, kept, strict=True)]
    samples = [part.samples[part.samples["cell_id"].isin(own)] for part, own in zip(parts, kept, strict=True)]
    environments = {key: place for part in parts for key, place in part.environments.items()}
    used = set(cells["environment"])
    return Part(
        pd.concat(rows, ignore_index=True),
        stack(samples),
        cells[CELLS].reset_index(drop=True),
        {key: environments[key] for key in sorted(used)},
    )


def write(roots: Sequence[Path], to: Path) -> dict[str, Any]:
    """Archive these folders in `to`; returns what study.json says. Equal cells give equal bytes."""
    whole = merge([read(root) for root in roots])
    if whole.rows.empty:
        raise ConfigError(f"no cell in {', '.join(map(str, roots))} is whole")
    configs = whole.cells.set_index("cell_id")["config"]
    rows = whole.rows.sort_values(["cell_id"], kind="stable", ignore_index=True)
    table = relate(rows, {str(name): dense_key(config_of(config, to)) for name, config in configs.items()})
    texts = {name: whole.samples[name].cat for name in TEXTS}
    ordered = {name: text.reorder_categories(sorted(text.categories)) for name, text in texts.items()}
    samples = whole.samples.assign(**ordered).sort_values("cell_id", kind="stable", ignore_index=True)
    lines = claims.verdicts(table, samples)
    plain = table[table["layer"].isna()].dropna(axis="columns", how="all").to_csv(index=False).encode()
    large = len(plain) > LARGE
    files = {
        "table.parquet": _parquet(table),
        "table.csv.gz" if large else "table.csv": gzip.compress(plain, mtime=0) if large else plain,
        "samples.parquet": _parquet(samples, repeated="item"),
        "claims.csv": lines.to_csv(index=False).encode(),
        "cells.parquet": _parquet(whole.cells),
        "environment.json": _json(whole.environments),
    }
    said = {
        "schema": SCHEMA_VERSION,
        "commits": sorted({str(commit_of(place)) for place in whole.environments.values()}),
        "cells": {str(status): int(n) for status, n in whole.cells["status"].value_counts().sort_index().items()},
        "rows": len(table),
        "samples": len(samples),
        "files": {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in files.items()},
    }
    with place_errors(to):
        to.mkdir(parents=True, exist_ok=True)
        (to / ("table.csv" if large else "table.csv.gz")).unlink(missing_ok=True)
        for name, content in (files | {"study.json": _json(said)}).items():
            write_atomic(to / name, content)
    return said


def _parquet(frame: pd.DataFrame, repeated: str | None = None) -> bytes:
    """repeated: a column whose long runs come again cell by cell. Codes of a dictionary are packed in bits, and zstd
    finds runs of bytes: as it stands such a column takes half of the room.
    """
    buffer = io.BytesIO()
    coded = [name for name in frame.columns if name != repeated]
    frame.to_parquet(buffer, index=False, compression="zstd", compression_level=12, use_dictionary=coded)
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def main(arguments: Sequence[str]) -> int:
    """The command `archive`: merge folders into one study. Returns the exit code."""
    parser = arguments_of("archive", "The whole cells of these folders in one, to be kept.")
    parser.add_argument("results", nargs="*", type=Path, default=[Path("results")], help="folders (default: results)")
    parser.add_argument("--to", type=Path, default=Path("results/study"), help="default: results/study")
    given = parser.parse_args(arguments)

    def do() -> None:
        told = write(given.results, given.to)
        size = sum(file["bytes"] for file in told["files"].values()) / 2**20
        cells = ", ".join(f"{n} {status}" for status, n in told["cells"].items())
        counts = f"cells {cells}; {told['rows']} rows, {told['samples']} samples, {size:.1f} MiB"
        say(stdout(), f"{given.to}: {counts}")

    return finish(do)
