"""What an archived study says of its cells: cells.parquet and environment.json (see `harness.report.archive`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import DamagedError
from harness.reading import json_of, read_json, read_parquet

CELLS = ["cell_id", "status", "message", "started", "ended", "environment", "config"]


def read_cells(study: Path) -> pd.DataFrame:
    """One line a cell, with the columns `CELLS`, all of them texts. Raises `DamagedError`."""
    path = study / "cells.parquet"
    cells = read_parquet(path, kinds=dict.fromkeys(CELLS, "string"))
    if cells["cell_id"].isna().any() or cells["cell_id"].duplicated().any() or cells["config"].isna().any():
        raise DamagedError(f"{path} can't be read: a cell is there twice, or has no name or config")
    return cells


def config_of(text: str, study: Path) -> dict[str, Any]:
    """A cell's config, of the column `config`."""
    return json_of(text, study / "cells.parquet")


def read_environments(study: Path) -> dict[str, Any]:
    """Key -> what `harness.results.environment.environment` said there."""
    path = study / "environment.json"
    found = read_json(path)
    if not all(isinstance(place, dict) for place in found.values()):
        raise DamagedError(f"{path} can't be read: it does not hold an environment for each key")
    return found


def commit_of(environment: dict[str, Any]) -> str | None:
    """The commit that an environment names, if any."""
    git = environment.get("git")
    commit = git.get("commit") if isinstance(git, dict) else None
    return commit if isinstance(commit, str) else None
