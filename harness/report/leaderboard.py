"""The leaderboard: what every scheme loses, needs and gains at equal achieved sparsity.

What a scheme loses comes from `harness.claims.field`; here its speed and its needs stand beside that, as a table for a
terminal, for a README and for the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from harness.arguments import add_results, finish
from harness.arguments import parser as arguments_of
from harness.claims import field
from harness.console import say, stdout, styled, table
from harness.errors import ConfigError
from harness.places import CONF
from harness.report import adviser, tables
from harness.report.manual import NEEDS, entries
from harness.report.terminal import PHASES
from harness.results.beside import ASKED, EQUAL_SPARSITY, times_beside
from harness.results.collect import headline
from harness.results.find import find
from harness.results.rows import short_device

POINTS = 100  # of accuracy, to one
NO_SCHEME = ("random",)  # not in the short table
HEADS = ("needs", "achieved", "perplexity\nx dense [95 %]", "", "accuracy\npoints [95 %]", "", "generated\npoints")
NOTE = (
    "At equal achieved sparsity: the share of all block weights that was counted as skipped, what deciding reads "
    f"charged, within {100 * EQUAL_SPARSITY:g} points of the level. Brackets are 95 % intervals, paired with the "
    "dense model. Schemes that share a letter can't be told apart (paired tests of all pairs, Holm). A star marks the "
    "best on text of those that need as much (nothing, calibration, training), and what can't be told apart from it."
)


def standings(rows: pd.DataFrame, samples: pd.DataFrame, limited: bool = False) -> pd.DataFrame:
    """`field.board` with what else is known of each scheme, one line each.

    scheme: its name. needs, needs_tokens: what it was given, and tokens of text. leads: whether it is the best on text
    of those that need as much, or shares a letter with it; oracles and the floor lead nobody.
    `speedup:<device>, <dtype>`: a column for each that one was timed on.

    Speed is the kernel's against the strongest dense step, at the smallest batch and context timed, of the same scheme
    where it skips as much, wherever it was timed: what was asked for may be by arithmetic here and counted there.
    """
    lines = field.board(rows, samples, limited)
    facts = {entry.name: entry.cls.needs for entry in entries(CONF)}
    declared = pd.Series([_needs(str(method), facts) for method in lines["method"]], lines.index, dtype="string")
    told = rows.drop_duplicates("cell_id").set_index("cell_id")
    lines["needs"] = lines["cell_id"].map(told["needs"]).astype("string").fillna(declared)
    lines["needs_tokens"] = lines["cell_id"].map(told["needs_tokens"]).astype("Int64")
    variants = lines["variant"].fillna("")
    lines["scheme"] = lines["method"].str.cat(variants, sep=" ").str.strip()
    lines["leads"] = _leads(lines)
    measured = rows[(rows["source"] == "measured") & (rows["status"] == "ok")]
    measured = measured if limited else measured[~measured["limited"].fillna(False).astype(bool)]
    times = adviser.times(measured)
    told = headline(measured)[["cell_id", *adviser.SCHEME, *ASKED, "achieved_model"]]
    times = times_beside(lines, times.merge(told, on="cell_id"), adviser.SCHEME, adviser.MACHINE)
    times = times.sort_values(["batch", "context"], kind="stable")
    for (device, dtype), timed in times.groupby(adviser.MACHINE):
        lines[f"speedup:{short_device(str(device))}, {dtype}"] = timed.drop_duplicates("line").set_index("line")[
            "speedup"
        ]
    return lines


def _leads(lines: pd.DataFrame) -> pd.Series:
    fair = lines["text:group"].notna() & ~lines["oracle"].fillna(False).astype(bool) & ~lines["method"].isin(NO_SCHEME)
    leads = pd.Series(False, lines.index)
    for _, peers in lines[fair].groupby([*field.ARENA, "needs"], dropna=False):
        best = set(peers.loc[peers["text"].astype(float).idxmin(), "text:group"])
        leads[peers.index] = [bool(best & set(group)) for group in peers["text:group"]]
    return leads


def _needs(method: str, facts: dict[str, str]) -> str:
    """The most that any method of a nest needs."""
    order = list(NEEDS)
    return max((facts.get(name, "nothing") for name in method.split("+")), key=order.index)


def timed_on(lines: pd.DataFrame) -> list[str]:
    """The columns of speeds that hold any."""
    return [name for name in lines.columns if name.startswith("speedup:") and lines[name].notna().any()]


# ------------------------------------------------------------------------------------------------------- a terminal


def show(lines: pd.DataFrame) -> None:
    """Print one table a model, phase policy and level, best on text first."""
    console = stdout()
    for (model, phase, prefix, level), arena in lines.groupby(field.ARENA, dropna=False):
        title = f"{model} · {level:.0%} of all block weights · {PHASES.get(phase, phase)}"
        title += f" · first {prefix} tokens dense" if prefix else ""
        listing = table(title)
        speeds = timed_on(arena)
        listing.add_column("scheme", overflow="fold")
        for head in HEADS:
            listing.add_column(head, justify="left" if head in ("", "needs") else "right", no_wrap=True)
        listing.add_column("answer\ntokens", justify="right")
        for name in speeds:
            listing.add_column(f"speed-up\n{name.removeprefix('speedup:')}", justify="right")
        seen = arena[arena["missing"].isna() | arena["achieved_model"].notna()]
        for line in seen.to_dict("records"):
            cells = [
                _named(line),
                _given(line),
                _form(line["achieved_model"], ".1%"),
                _ratio(line),
                _letters(line),
            ]
            cells += [_points(line, "accuracy"), _group(line, "accuracy"), _form(line["generated"], "+.1f", POINTS)]
            cells += [_lengths(line), *(_form(line[name], ".2f") for name in speeds)]
            listing.add_row(*(styled(str(cell)) for cell in cells))
        console.print(listing)
        for line in arena[arena["missing"].notna()].to_dict("records"):
            say(console, f"{_named(line)}: {line['missing']}", style="dim")
    say(console, NOTE, style="dim")


def _named(line: dict[str, Any]) -> str:
    return str(line["scheme"]) + (" (oracle)" if line["oracle"] is True else "")


def _given(line: dict[str, Any]) -> str:
    """What it needs, with thousands of tokens where they are known."""
    tokens = line["needs_tokens"]
    return str(line["needs"]) + ("" if pd.isna(tokens) else f", {tokens / 1000:.0f}k tokens")


def _form(value: Any, form: str, times: float = 1) -> str:
    return "" if pd.isna(value) else f"{times * float(value):{form}}"


def _big(value: Any) -> str:
    """Three digits after the point where they say anything: a ratio of thousands is a ruin whatever they are."""
    if pd.isna(value):
        return ""
    rounded = float(f"{value:.3g}")
    return f"{value:.3f}" if value < 10 else f"{rounded:g}" if rounded < 1000 else f"{rounded:,.0f}"


def _ratio(line: dict[str, Any]) -> str:
    between = f" [{_big(line['text:low'])}, {_big(line['text:high'])}]" if not pd.isna(line["text:low"]) else ""
    return _big(line["text"]) + between


def _points(line: dict[str, Any], measure: str) -> str:
    value, low, high = (_form(line[f"{measure}{part}"], "+.1f", POINTS) for part in ("", ":low", ":high"))
    return value + (f" [{low}, {high}]" if low else "")


def _group(line: dict[str, Any], measure: str) -> str:
    return "" if pd.isna(line[f"{measure}:group"]) else str(line[f"{measure}:group"])


def _letters(line: dict[str, Any]) -> str:
    """Of its group on text, with a star where it leads those that need as much."""
    return _group(line, "text") + ("*" if line["leads"] else "")


def _lengths(line: dict[str, Any]) -> str:
    own, dense = _form(line["answer_tokens"], ".1f"), _form(line["dense:answer_tokens"], ".1f")
    return f"{own} / {dense}" if own and dense else own


# --------------------------------------------------------------------------------------------------------- the page

CHOICES = {"model": True, "level": False, "tokens": True, "needs": False}


def section(lines: pd.DataFrame) -> str:
    """The report's leaderboard: one table that is sorted, filtered and chosen from."""
    if lines.empty:
        return "<p>No cell comes near 25, 40, 50 or 60 % of the block weights.</p>"
    size = lines.groupby("model")["model"].transform("size")  # the page starts with the model of most lines
    lines = lines.iloc[size.rank(ascending=False, method="min").argsort(kind="stable")]
    speeds = timed_on(lines)
    head = {"scheme": False, "level": True, "achieved": True, "perplexity × dense": True, "group, text": False}
    head |= {"accuracy, points": True, "group, answers": False, "generated, points": True, "answer tokens": True}
    head |= {f"speed-up, {name.removeprefix('speedup:')}": True for name in speeds}
    head |= {"needs": False, "learnt from, tokens": True, "not placed because": False, "model": False, "tokens": False}
    body = [f"<tr>{''.join(_cells(line, speeds))}</tr>" for line in lines.to_dict("records")]
    return f"<p>{escape(NOTE)}</p>{tables.listing('leaderboard-table', head, body, choices=CHOICES)}"


def _cells(line: dict[str, Any], speeds: Sequence[str]) -> Iterator[str]:
    def text(value: Any) -> str:
        return tables.words(str(value))

    def between(measure: str, shown: str) -> str:
        value, _, interval = shown.partition(" ")
        interval = f" <i>{interval}</i>" if interval else ""
        return tables.number(line[measure], value + interval)

    yield text(_named(line))
    yield tables.number(line["level"], f"{line['level']:.0%}")
    yield tables.number(line["achieved_model"], _form(line["achieved_model"], ".1%"))
    yield between("text", _ratio(line))
    yield text(_letters(line))
    yield between("accuracy", _points(line, "accuracy"))
    yield text(_group(line, "accuracy"))
    yield between("generated", _points(line, "generated"))
    yield tables.number(line["answer_tokens"], _lengths(line))
    for name in speeds:
        yield tables.number(line[name], _form(line[name], ".2f") + ("×" if not pd.isna(line[name]) else ""))
    yield text(line["needs"])
    yield tables.number(line["needs_tokens"], "" if pd.isna(line["needs_tokens"]) else f"{line['needs_tokens']:,}")
    yield text("" if pd.isna(line["missing"]) else line["missing"])
    yield text(line["model"])
    yield text(PHASES.get(line["phase"], line["phase"]))


# ------------------------------------------------------------------------------------------------ a README, a page


def by_model(lines: pd.DataFrame, models: Sequence[str], level: float) -> str:
    """The short table of several models at one level: a line a scheme, a column a model, best on average first.

    Only schemes that two of the models have. A cell is as in `markdown`; what missed the level has no letters and says
    where it is. Speed is told once a model, of the GPU that most of its schemes were timed on, else of another; then
    of a CPU. Of its options a scheme names those that tell it from others of its method here.
    """
    own = lines[lines["model"].isin(models) & (lines["level"] == level) & (lines["dense_prefix"] == 0)]
    own = own[~own["method"].isin(NO_SCHEME) & ~own["oracle"].fillna(False).astype(bool) & own["text"].notna()]
    own = own[own.groupby(["phase", "scheme"])["model"].transform("nunique") >= min(2, len(models))]
    if own.empty:
        return "No committed cell comes near this level."
    own = own.assign(gpu=_first_of(own, [c for c in timed_on(own) if not c.startswith("speedup:CPU")]))
    own = own.assign(cpu=_first_of(own, [c for c in timed_on(own) if c.startswith("speedup:CPU")]))
    named = _told_apart(own["scheme"].unique())
    worth = own["text"].astype(float).map(np.log).groupby([own["phase"], own["scheme"]]).mean()
    short = [model.rpartition("-")[2].upper() for model in models]  # the size that a name ends with
    heads = ["scheme", "needs", *short, f"step on a GPU, {' / '.join(short)}", "on a CPU thread"]
    found = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for phase, scheme in worth.sort_values(kind="stable").index:
        at = own[(own["phase"] == phase) & (own["scheme"] == scheme)].set_index("model")
        there = [at.loc[model] if model in at.index else None for model in models]
        shown = [f"`{named[scheme]}`" + ("" if phase == "all" else " (prompt dense)"), _given(at.iloc[0].to_dict())]
        shown += ["" if line is None else _brief(line) for line in there]
        steps = ["–" if line is None or pd.isna(line["gpu"]) else _form(line["gpu"], ".2f") for line in there]
        shown += [" / ".join(steps) if set(steps) != {"–"} else "", _form(at["cpu"].max(), ".2f")]
        found.append(f"| {' | '.join(shown)} |")
    return "\n".join(found)


def _first_of(own: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """By line the first of these columns that holds something; of a model, those that hold most come first."""
    found = pd.Series(np.nan, own.index)
    for _, cells in own.groupby("model"):
        for name in cells[list(columns)].notna().sum().sort_values(ascending=False, kind="stable").index:
            found[cells.index] = found[cells.index].fillna(cells[name].astype(float))
    return found


def _told_apart(schemes: Iterable[str]) -> dict[str, str]:
    """Names without the options that all schemes of one method share: `combined steps=400` alone is `combined`."""
    options = {scheme: scheme.partition(" ")[2].split(",") for scheme in schemes}
    named = {}
    for scheme in options:
        method = scheme.partition(" ")[0]
        shared = set.intersection(*(set(given) for other, given in options.items() if other.split(" ")[0] == method))
        own = ",".join(option for option in options[scheme] if option not in shared)
        named[scheme] = f"{method} {own}".strip()
    return named


def markdown(lines: pd.DataFrame, model: str) -> str:
    """The short table of one model: a line a scheme, a column a level, empty where there is no cell; oracles left out.

    A cell: perplexity over dense, bold where it leads those that need as much, letters of its group, points of
    accuracy. Schemes that keep the prompt dense are marked; their letters are of their own group. A speed-up is the
    best of those at the scheme's levels.
    """
    own = lines[(lines["model"] == model) & ~lines["method"].isin(NO_SCHEME) & (lines["dense_prefix"] == 0)]
    own = own[own["missing"].isna() & ~own["oracle"].fillna(False).astype(bool)]
    if own.empty:
        return "No committed cell comes near these levels."
    levels, speeds = sorted(own["level"].unique()), timed_on(own)
    heads = ["scheme", "needs", *(f"{level:.0%}" for level in levels)]
    heads += [f"speed-up, {name.removeprefix('speedup:')}" for name in speeds]
    found = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    own = own.sort_values(["level", "text"], kind="stable")
    for (phase, scheme), cells in own.groupby(["phase", "scheme"], sort=False):
        at = cells.set_index("level")
        shown = [f"`{scheme}`" + ("" if phase == "all" else " (prompt dense)"), _given(cells.iloc[0].to_dict())]
        shown += [_brief(at.loc[level]) if level in at.index else "" for level in levels]
        shown += [_form(cells[name].max(), ".2f") + ("x" if cells[name].notna().any() else "") for name in speeds]
        found.append(f"| {' | '.join(shown)} |")
    return "\n".join(found)


def _brief(line: pd.Series) -> str:
    parts = [f"{_big(line['text'])}x", f"<sup>{line['text:group']}</sup>" if not pd.isna(line["text:group"]) else ""]
    if not pd.isna(line["missing"]):
        parts[1] = f" ({_form(line['achieved_model'], '.1f', POINTS)} %)"
    if line["leads"]:
        parts[0] = f"**{parts[0]}**"
    points = "" if pd.isna(line["accuracy"]) else f", {_form(line['accuracy'], '+.1f', POINTS)}"
    return "".join(parts) + points


# ------------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str]) -> int:
    """The command `leaderboard`. Returns the exit code."""
    parser = arguments_of("leaderboard", "Every scheme at equal achieved sparsity: quality, needs and speed.")
    add_results(parser)
    parser.add_argument("--limited", action="store_true", help="take smoke runs in")
    given = parser.parse_args(arguments)

    def do() -> None:
        results = find(given.results)
        lines = standings(results.table, results.samples, given.limited)
        if lines.empty:
            runs = "" if given.limited else " of a whole run; --limited takes smoke runs in"
            raise ConfigError(
                f"no cell in {given.results} has a place on the board: that takes quality and sparsity{runs}"
            )
        show(lines)

    return finish(do)
