"""Where rows and samples are read from: a results folder with cells, or a committed study."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from harness.errors import ConfigError
from harness.results.collect import collect, read_table
from harness.results.samples import read_samples
from harness.results.store import Store


@dataclass(frozen=True)
class Results:
    """table: of `harness.results.collect.collect`. folder: where it and the samples were found."""

    table: pd.DataFrame
    folder: Path

    @cached_property
    def samples(self) -> pd.DataFrame:
        """Per-item values, as `harness.results.samples.read_samples` gives them."""
        return read_samples(self.folder)


def find(root: Path | str) -> Results:
    """The cells of `root`, collected, if it has any; else what `stored` finds."""
    root = Path(root)
    return Results(collect(root), root) if Store(root).cells() else stored(root)


def stored(root: Path | str) -> Results:
    """A stored table: `root/study`, else `root` itself. Nothing is collected or written.

    Raises `ConfigError` where there is none.
    """
    root = Path(root)
    for folder in (root / "study", root):
        for name in ("table.parquet", "table.csv"):
            if (folder / name).exists():
                return Results(read_table(folder / name), folder)
    raise ConfigError(f"there are no results in {root}: run a cell first, for example with `make run`")
