"""What a run prints: the plan, the joined table, the summary. All of it computed from the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.console import duration, say, stdout, styled, table
from harness.results.cells import CellView
from harness.results.collect import headline, relate
from harness.results.store import State

PLAN = {
    "run": ("run", "green"),
    "partial": ("finish", "green"),
    "stale": ("run again: the method or the row schema has changed", "yellow"),
    "skip": ("skip: finished", "dim"),
    "failed": ("failed before", "red"),
    "unsupported": ("skip: this method can't run on this model", "dim"),
    "locked": ("skip: another process is at work on it", "yellow"),
}
AGAIN = {  # where the user asks for it
    "skip": "run again, though finished",
    "failed": "run again: failed before",
    "unsupported": "try again: this method can't run on this model",
}
OUTCOMES = {
    "failed": "failed",
    "oom": "out of memory",
    "invalid": "invalid",
    "unsupported": "unsupported",
    "locked": "locked",
}
PHASES = {"all": "every token sparse", "decode": "prompt dense, later tokens sparse"}
LAYOUTS = ("tasks", "means", "short")  # by how much they show: every task, the mean over tasks, no KL either
CUT = "†"  # beside a score some of whose items are longer than the model's maximum
MASKED_NOTE = "masked: computed densely on zeroed inputs, to measure quality. Its time is not a measure of speed."


def print_table(rows: pd.DataFrame, console: Console | None = None) -> None:
    """Print quality, achieved sparsity and latency of every cell. `rows`: from `harness.results.collect.collect`.

    One block for each (model, phase policy, seed). Accuracy is shown by task where the width allows, else
    as the mean here and by task below.
    """
    console = console or stdout()
    lines = headline(rows)
    for _, block in lines.groupby(["model", "phase", "dense_prefix", "seed", "limited"], sort=False, dropna=False):
        block = block.dropna(axis="columns", how="all")
        measured = block[block["status"] == "ok"]
        if len(measured):
            layout = next((layout for layout in LAYOUTS if _fits(_joined(measured, layout), console)), LAYOUTS[-1])
            console.print(_joined(measured, layout))
            if layout != "tasks" and _tasks(measured):
                console.print(_by_task(measured))
            if note := truncated_note(measured):
                say(console, note, style="yellow")
            if "execution" in measured and (measured["execution"] == "masked").any():
                say(console, MASKED_NOTE, style="yellow")
        for _, line in block[block["status"] != "ok"].iterrows():
            outcome = OUTCOMES.get(line["status"], line["status"])
            name = f"{line.get('model', '')} {_method(line)} {_number(line, 'sparsity_requested', '.2f')}"
            say(console, f"{name.strip()}: {outcome}: {line.get('message', '')}", style="red")
        console.print()


def print_plan(
    states: Mapping[str, State], console: Console | None = None, expected: Mapping[str, float | None] | None = None
) -> None:
    """Print what a run is about to do. `states`: cell id -> `Store.state`.

    expected: of the cells that will run, how many seconds they may take, where cells like them have run before.
    """
    console, expected = console or stdout(), expected or {}
    listing = Table(box=None, pad_edge=False, show_header=False)
    listing.add_column(overflow="fold")
    listing.add_column()
    for name, state in states.items():
        words, style = PLAN[state]
        if name in expected and state in AGAIN:
            words, style = AGAIN[state], "green"
        took = expected.get(name)
        listing.add_row(styled(name), styled(words + (f", about {duration(took)}" if took else ""), style=style))
    console.print(listing)
    known = [took for took in expected.values() if took is not None]
    if known:
        rest = f", and {len(expected) - len(known)} of which nothing is known" if len(known) < len(expected) else ""
        say(console, f"{len(known)} cells to run, about {duration(sum(known))} one after the other{rest}")


def print_summary(outcomes: Mapping[str, tuple[str, str]], console: Console | None = None) -> None:
    """Print how a sweep ended, naming what failed. `outcomes`: cell id -> (status, message)."""
    console = console or stdout()
    bad = {name: outcome for name, outcome in outcomes.items() if outcome[0] in OUTCOMES}
    done = len(outcomes) - len(bad)
    say(console, f"{done} of {len(outcomes)} cells have results", style="bold red" if bad else "bold green")
    for name, (status, message) in bad.items():
        say(console, f"  {name}: {OUTCOMES[status]}: {message}", style="red")


def in_brief(cell: CellView) -> str:
    """What was found of a cell, in a few words: "perplexity 20.81, accuracy 0.52, 48 % of weights skipped"."""
    rows = [cell.read(probe) for probe in cell.probes()]
    if not rows:
        return ""
    line = headline(relate(pd.concat(rows, ignore_index=True), {})).iloc[0]
    forms = (
        ("perplexity", "perplexity {:.4g}"),
        ("accuracy", "accuracy {:.3f}"),
        ("achieved_model", "{:.1%} of weights skipped"),
        ("tpot_ms", "{:.3g} ms a token"),
    )
    return ", ".join(form.format(line[name]) for name, form in forms if not pd.isna(line.get(name, pd.NA)))


def truncated_note(lines: pd.DataFrame) -> str:
    """How many items of which task are longer than the model's maximum, in the cell that has most; empty if none."""
    names = [name for name in lines.columns if name.startswith("truncated:") and lines[name].notna().any()]
    counts = ", ".join(f"{name.removeprefix('truncated:')} {lines[name].max():g}" for name in names)
    words = "items longer than the model's maximum (contexts are cut to it, windows of text are not)"
    return f"{CUT} {words}: {counts}" if names else ""


def _fits(listing: Table, console: Console) -> bool:
    unbounded = console.options.update(max_width=10_000)
    return console.measure(listing, options=unbounded).maximum <= console.width


def _joined(lines: pd.DataFrame, layout: str) -> Table:
    listing = table(_title(lines.iloc[0]))
    columns: list[tuple[str, Any]] = []

    def column(header: str, key: str, form: str, justify: Any = "right") -> None:
        if key in lines:
            listing.add_column(header, justify=justify, no_wrap=True)
            columns.append((key, form))

    listing.add_column("method", overflow="fold")  # a variant may be long
    column("needs", "needs", "needs", justify="left")
    column("sparsity\nrequested", "sparsity_requested", ".2f")
    column("achieved\nMLP", "achieved_mlp", ".3f")
    column("achieved\nmodel", "achieved_model", ".3f")
    if "kv_read" in lines and (lines["kv_read"] < 1).any():  # a column that says 100 % in every line says nothing
        column("KV bytes\nread", "kv_read", ".1%")
    column("perplexity", "perplexity", ".2f")
    if layout == "tasks":
        for task in _tasks(lines):
            column(task.replace("_", "\n"), f"acc:{task}", ".2f")
    else:
        column(f"accuracy\nmean of {len(_tasks(lines))}", "accuracy", ".3f")
    if layout != "short":
        column("KL to\ndense", "kl", ".3f")
    column("answers\nflipped", "flips", ".1%")
    column("ms a\ntoken", "tpot_ms", "time")
    column("dense\nbeside", "dense:tpot_ms", ".1f")
    column("speed-up", "speedup", ".2fx")
    for _, line in lines.iterrows():
        special = {"time": _time, "needs": _needs}
        cells = [special[form](line) if form in special else _score(line, key, form) for key, form in columns]
        listing.add_row(styled(_method(line)), *cells, style="bold" if line["method"] == "dense" else None)
    return listing


def _by_task(lines: pd.DataFrame) -> Table:
    listing = table("accuracy by task (± standard error)")
    tasks = _tasks(lines)
    listing.add_column("method", overflow="fold")  # a variant may be long
    listing.add_column("requested", justify="right", no_wrap=True)
    for task in tasks:
        listing.add_column(task.replace("_", "\n"), justify="right", no_wrap=True)
    for _, line in lines.iterrows():
        scores = []
        for task in tasks:
            error = _number(line, f"stderr:{task}", ".2f")
            score = _number(line, f"acc:{task}", ".3f") + (f" ±{error.lstrip('0')}" if error else "")
            scores.append(score + _cut(line, f"acc:{task}"))
        style = "bold" if line["method"] == "dense" else None
        listing.add_row(styled(_method(line)), _number(line, "sparsity_requested", ".2f"), *scores, style=style)
    return listing


def _title(line: pd.Series) -> str:
    phase = line.get("phase", "")
    stored = line.get("weight_format")
    parts = [
        line.get("model", ""),
        "" if stored is None or pd.isna(stored) else f"{stored} weights",
        PHASES.get(phase, phase),
    ]
    if line.get("dense_prefix", 0) > 0:
        parts.append(f"first {line['dense_prefix']} tokens dense")
    if "seed" in line:
        parts.append(f"seed {line['seed']}")
    if line.get("limited", False):
        parts.append("LIMITED RUN: a smoke test, not a result")
    return " · ".join(str(part) for part in parts if part)


def _method(line: pd.Series) -> str:
    variant = line.get("variant")
    return str(line["method"]) if pd.isna(variant) or variant == "" else f"{line['method']} {variant}"


def _time(line: pd.Series) -> Text:
    if pd.isna(line["tpot_ms"]):
        return Text("")
    if line.get("execution") == "masked":
        return Text(f"{line['tpot_ms']:.1f} masked", style="dim yellow")
    return Text(f"{line['tpot_ms']:.1f}")


def _needs(line: pd.Series) -> Text:
    """What the methods had to be given: "nothing", "calibration 16k", "training 71M"."""
    tokens = line.get("needs_tokens", pd.NA)
    if pd.isna(line["needs"]) or pd.isna(tokens):
        return styled("" if pd.isna(line["needs"]) else str(line["needs"]))
    size, unit = next((s, u) for s, u in ((10**9, "G"), (10**6, "M"), (1000, "k"), (1, "")) if tokens >= s)
    return styled(f"{line['needs']} {tokens / size:.0f}{unit}")


def _tasks(lines: pd.DataFrame) -> list[str]:
    return [name.removeprefix("acc:") for name in lines.columns if name.startswith("acc:")]


def _cut(line: pd.Series, key: str) -> str:
    """The mark of a score some of whose items are longer than the model's maximum."""
    tasks = {"perplexity": ["perplexity"], "accuracy": _tasks(line.to_frame().T)}.get(key, [key.removeprefix("acc:")])
    return CUT if any(pd.notna(line.get(f"truncated:{task}", pd.NA)) for task in tasks) else ""


def _score(line: pd.Series, key: str, form: str) -> Text:
    return styled(_number(line, key, form) + _cut(line, key))


def _number(line: pd.Series, key: str, form: str) -> str:
    """The value in this form, where a trailing "x" is a unit; empty if it is missing."""
    value = line.get(key, pd.NA)
    if pd.isna(value):
        return ""
    return f"{value:{form.removesuffix('x')}}" + ("x" if form.endswith("x") else "")
