"""The command `diff`: two cells side by side, what differs in their configs and in their rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from harness.arguments import add_results, finish, parser
from harness.console import say, stdout, styled, table
from harness.report.show import Shown, brief, flat, load, places, quantity, written
from harness.results.rows import COLUMNS

SURE = 2.0  # standard errors from which on a difference is marked
# Coordinates of a row; its variant and execution say how it was made, which is what two cells differ in.
KEY = ["probe", "task", "metric", "site", "layer", "step_phase", "batch", "context", "split"]


def matched(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """The rows of both, matched by `KEY` and, where one key has several (repeats of a timing), by execution, in order.

    Columns: KEY, execution, unit, and value, stderr, n with the suffixes _a and _b; difference = b - a; sure: the
    difference over its standard error, missing where either has none.
    """
    key, sides = [*KEY, "execution", "variant", "unit"], []
    for rows in (left, right):
        rows = rows[rows["status"] == "ok"]
        twice = rows.duplicated(KEY, keep=False)
        # What was run is a part of the key only where there are several ways in one cell.
        rows = rows.assign(execution=rows["execution"].where(twice), variant=rows["variant"].where(twice))
        rows = rows.assign(turn=rows.groupby(key, dropna=False).cumcount(), place=range(len(rows)))
        sides.append(rows[[*key, "turn", "place", "value", "stderr", "n"]])
    both = sides[0].merge(sides[1], how="outer", on=[*key, "turn"], suffixes=("_a", "_b"))
    both = both.sort_values(["place_a", "place_b"], kind="stable", ignore_index=True)
    both["difference"] = both["value_b"] - both["value_a"]
    error = (both["stderr_a"] ** 2 + both["stderr_b"] ** 2) ** 0.5
    both["sure"] = (both["difference"].abs() / error.where(error > 0)).astype("Float64")
    return both.assign(engine=pd.Series(pd.NA, index=both.index, dtype=COLUMNS["engine"]))


def print_diff(left: Shown, right: Shown, everything: bool = False, console: Console | None = None) -> None:
    """Print what differs: in the rows of `brief`, or in all."""
    console = console or stdout()
    say(console, ("A  ", "bold cyan"), (left.name, "bold"), f"  {left.status.get('status', 'not run')}")
    say(console, ("B  ", "bold cyan"), (right.name, "bold"), f"  {right.status.get('status', 'not run')}")
    differing, equal = config_diff(left, right)
    say(console, f"config: {differing.row_count} keys differ, {equal} are equal")
    if differing.row_count:
        console.print(differing)
    both = matched(*(side.rows if everything else brief(side.rows) for side in (left, right)))
    shared = both["value_a"].notna() & both["value_b"].notna()
    for probe, rows in both[shared].groupby("probe", sort=False):
        console.print(rows_diff(str(probe), rows))
    for name, only in (("A", both[both["value_b"].isna()]), ("B", both[both["value_a"].isna()])):
        if len(only):
            told = ", ".join(dict.fromkeys(f"{row.probe} {row.metric}" for row in only.itertuples()))
            say(console, f"only in {name}: {told}", style="dim")
    if shared.any():
        say(
            console,
            f"bold: more than {SURE:g} standard errors of two independent values; of equal items that is strict",
            style="dim",
        )
    else:
        say(console, "no row is about the same fact in both")


def config_diff(left: Shown, right: Shown) -> tuple[Table, int]:
    """The keys whose values differ, and how many are equal."""
    ours, theirs = flat(left.config), flat(right.config)
    differing = [key for key in sorted({**ours, **theirs}) if ours.get(key) != theirs.get(key)]
    equal = len({**ours, **theirs}) - len(differing)
    listing = table()
    listing.add_column("key", style="cyan", no_wrap=True)
    listing.add_column("A", overflow="fold")
    listing.add_column("B", overflow="fold")
    for key in differing:
        listing.add_row(*(styled(text) for text in (key, _value(ours, key), _value(theirs, key))))
    return listing, equal


def _value(config: dict[str, Any], key: str) -> str:
    return written(config[key]) if key in config else ""


def rows_diff(probe: str, rows: pd.DataFrame) -> Table:
    """The values of both, and B minus A."""
    listing, about = table(probe), places(rows)
    for name in about:
        listing.add_column(name.replace("_", " "), overflow="fold")
    for header in ("A", "B", "B - A", "unit"):
        listing.add_column(header, justify="left" if header == "unit" else "right", no_wrap=True)
    for _, row in rows.iterrows():
        cells = [styled("" if pd.isna(row[name]) else str(row[name])) for name in about]
        cells += [styled(quantity(row[f"value{side}"], row[f"stderr{side}"])) for side in ("_a", "_b")]
        ratio = row["sure"]
        bold = "bold" if pd.notna(ratio) and math.isfinite(ratio) and ratio > SURE else ""
        change = quantity(row["difference"])
        cells += [styled(change if change.startswith("-") else f"+{change}", style=bold), styled(str(row["unit"]))]
        listing.add_row(*cells)
    return listing


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code."""
    options = parser("diff", "Two cells side by side: what differs in their configs and rows.")
    options.add_argument("a", help="a cell: its id, any part of it that no other has, or its folder")
    options.add_argument("b", help="another one")
    add_results(options)
    options.add_argument("--all", action="store_true", help="every row, those by layer and phase too")
    given = options.parse_args(arguments)
    return finish(lambda: print_diff(load(given.results, given.a), load(given.results, given.b), given.all))
