"""What figures are drawn from: the rows that may be, the cells they belong to, and the panels they share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd

from harness.errors import ConfigError
from harness.results.collect import ACCURACIES, headline
from harness.results.once import once
from harness.results.rows import quantised

# What a quality figure can show: its axis label, and whether more is better.
QUALITIES = {
    "perplexity": ("perplexity", False),
    "bits_per_byte": ("bits per byte", False),
    "accuracy": ("accuracy, mean over tasks", True),
    "kl": ("KL divergence to dense (nats)", False),
    "agreement": ("top-1 agreement with dense", True),
}
SAME_AS_DENSE = {"kl": 0.0, "agreement": 1.0}  # what the dense model itself would have
POLICY = ["model", "phase", "dense_prefix"]
PHASES = {"all": "every token sparse", "decode": "prompt dense"}


@once
def drawable(df: pd.DataFrame, limited: bool) -> pd.DataFrame:
    """Measured rows that are no failure, nor (unless `limited`) of a smoke run, nor of quantised weights.

    A quantised model is another one under the same name: beside 16 bits its cells would be drawn as repeats of theirs.
    """
    fine = (df["source"] == "measured") & (df["status"] == "ok") & ~quantised(df)
    rows = df[fine if limited else fine & ~df["limited"].fillna(False)]
    need(rows, "no rows but those of limited or failed runs")
    return rows


def lines(df: pd.DataFrame, limited: bool, needs: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The headline of the methods, with all of `needs` there, and that of the dense cells."""
    rows = drawable(df, limited)
    lines = headline(rows)
    absent = [name for name in needs if name not in lines]
    if absent:
        raise ConfigError(f"the table has nothing to draw: no {', '.join(absent)}")
    dense = lines["method"] == "dense"
    methods = scored_alike(lines[~dense].dropna(subset=list(needs)), rows)
    left_out = "" if limited or not df["limited"].fillna(False).any() else " (limited runs are left out)"
    need(methods, f"no cell of a method has all of {', '.join(needs)}{left_out}")
    return methods, scored_alike(lines[dense], rows)


def scored_alike(lines: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Of cells that differ only in what they were scored on, those scored as most cells are.

    A study scores some cells on more items, or on longer windows, than the others: their means are of another thing.
    """
    texts = _scored_on(rows)
    usual = lines["cell_id"].map(texts.map(texts.value_counts()))
    order = lines.assign(usual=usual).sort_values("usual", ascending=False, kind="stable")
    again = order.duplicated([*POLICY, "method", "variant", "sparsity_requested", "scope", "seed"])
    return lines[~again.reindex(lines.index) | usual.isna()]


@once
def _scored_on(rows: pd.DataFrame) -> pd.Series:
    """By cell, its tasks with their numbers of items and lengths, as one text."""
    scored = rows[(rows["probe"] == "quality") & rows["metric"].isin(["nll", *ACCURACIES])]
    parts = [scored[name].astype("string").fillna("") for name in ("task", "n", "context")]
    texts = parts[0] + " " + parts[1] + " " + parts[2]
    return texts.groupby(scored["cell_id"]).agg(lambda each: ", ".join(sorted(set(each))))


def at_one_request(rows: pd.DataFrame, sparsity: float | None, otherwise: str) -> tuple[pd.DataFrame, float]:
    """The methods' rows at a requested sparsity: by default the one that most have, of several the nearest to half.

    Rows of methods that were asked for no sparsity (an error budget, trained routers) are of no other request either.
    """
    rows = rows[rows["method"] != "dense"]
    if sparsity is None:
        offered = rows[["model", "method", "variant", "sparsity_requested"]].drop_duplicates()
        counts = offered["sparsity_requested"].value_counts()
        sparsity = min(counts.index, key=lambda value: (-counts[value], abs(value - 0.5)), default=math.nan)
    asked = rows["sparsity_requested"]
    rows = rows[(asked == sparsity).fillna(False) | asked.isna()]
    need(rows, otherwise)
    return rows, sparsity


def need(frame: pd.DataFrame, otherwise: str) -> None:
    """Raise `ConfigError` with the reason where the frame is empty."""
    if frame.empty:
        raise ConfigError(f"the table has nothing to draw: {otherwise}")


def quality(metric: str) -> tuple[str, str, bool]:
    """Column of the headline, axis label, whether more is better."""
    if metric in QUALITIES:
        return (metric, *QUALITIES[metric])
    return f"acc:{metric}", f"{metric} accuracy", True


def names(frame: pd.DataFrame) -> pd.Series:
    """The method with its options, as legends have it."""
    return (frame["method"] + " " + frame["variant"].fillna("")).str.strip()


def methods(panel: pd.DataFrame, *columns: str) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, one line a requested sparsity, ascending, with the means over seeds of these columns).

    A name comes once for each scope: 50 % of the MLPs is another request than 50 % of all block weights.
    """
    keys = [names(panel).rename("_name"), panel["scope"].fillna(""), panel["sparsity_requested"]]
    means = panel[list(columns)].groupby(keys, dropna=False).mean()
    for (name, _), cells in means.reset_index().groupby(["_name", "scope"]):
        yield str(name), cells.drop(columns=["_name", "scope"]).reset_index(drop=True)


def by_request(cells: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """One line a requested sparsity, ascending, with the means over seeds of these columns."""
    asked = cells["sparsity_requested"]
    return cells[list(columns)].groupby(asked, dropna=False).mean().reset_index()


def panels(frame: pd.DataFrame, keys: Sequence[str]) -> tuple[str, list[tuple[str, pd.DataFrame]]]:
    """Rows of each combination of `keys`, titled by what differs; what they share is the heading. Phase by phase."""
    shared = [key for key in keys if frame[key].nunique(dropna=False) == 1]
    differing = [key for key in keys if key not in shared]
    heading = _words(frame.iloc[0], shared)
    if not differing:
        return heading, [("", frame)]
    order = sorted(differing, key=lambda key: key not in POLICY[1:])
    return heading, [(_words(group.iloc[0], differing), group) for _, group in frame.groupby(order, dropna=False)]


def _words(row: pd.Series, keys: Sequence[str]) -> str:
    parts = []
    for key in keys:
        value = row[key]
        if key == "phase":
            parts.append(PHASES.get(value, str(value)))
        elif key != "dense_prefix":
            parts += [str(value)] if value != "" else []
        elif not pd.isna(value) and value > 0:
            parts.append(f"first {value} tokens dense")
    return ", ".join(parts)


def without(options: pd.Series, *names: str) -> pd.Series:
    """Variants less the options of these names."""
    return options.str.replace(rf"\b(?:{'|'.join(names)})=[^,;]*,?", "", regex=True).str.strip(",;")
