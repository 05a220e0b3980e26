"""Verdicts in words, for a terminal and for the report."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console

from harness.claims.evidence import LEVELS
from harness.console import say, stdout

VERDICTS = {  # and the colour of each
    "reproduced": "green",
    "not reproduced": "red",
    "inconclusive": "yellow",
    "described": "blue",  # what was averaged over is no sample, so no test is made
}
REACH = {  # what each of `LEVELS` reaches, for a table
    "measured": "what was measured",
    "items": "other text and questions like these",
    "seeds": "other training runs",
    "models": "other models like these",
}
POWER = "power: the smallest effect that these data would have shown in 80 % of cases"


def print_verdicts(lines: pd.DataFrame, console: Console | None = None) -> None:
    """The verdicts, up to three lines each: what was judged, the numbers, what they rest on."""
    console = console or stdout()
    for line in lines.itertuples():
        verdict = f"{line.verdict}{' (LIMITED RUN)' if line.limited else ''}"
        say(console, (verdict, VERDICTS[line.verdict]), " ", (line.statement, "bold"))
        facts = [words for words in (effect(line), *facts_of(line)) if words]
        if facts:
            say(console, f"  {'; '.join(facts)}")
        if not pd.isna(line.note):
            say(console, f"  {line.note}", style="dim")
    say(console, "")
    for words in levels(lines):
        say(console, words)
    say(console, POWER)


def effect(line: Any) -> str:
    """Effect and 95 % interval of a line of verdicts, or of a description the range over its units."""
    if pd.isna(line.effect):
        return ""
    between = "{:+.3g} to {:+.3g}" if line.verdict == "described" else "{:+.3g}, {:+.3g}"
    return f"{line.effect:+.3g} [{between.format(line.low, line.high)}] {line.unit}"


def facts_of(line: Any) -> list[str]:
    """For which models it holds, p, power, n, level and how much models differ, as far as a line has them."""
    words = [] if pd.isna(line.holds) or not line.holds else [str(line.holds)]
    words += [] if pd.isna(line.p_holm) else [f"p (Holm) {line.p_holm:.2g}"]
    words += [] if pd.isna(line.power) else [f"power from {line.power:.2g}"]
    if line.n:
        words += [f"n {line.n} {line.over}", f"level {line.level}"]
        words += [
            f"models {line.models}" if pd.isna(line.seeds) else f"training runs {line.seeds}, models {line.models}"
        ]
    return [*words, *spread(line)]


def by_model(line: Any) -> list[str]:
    """The effect on each model of a line of verdicts, with its interval where it has one."""
    return [] if pd.isna(line.by_model) or not line.by_model else str(line.by_model).split("; ")


def spread(line: Any) -> list[str]:
    """How much the effect differs between models, in words, where it has intervals on two or more of them."""
    if pd.isna(line.tau):
        return []
    return [f"between them it differs by tau {line.tau:.2g}, I² {line.i_squared:.0%}"]


def levels(lines: pd.DataFrame) -> list[str]:
    """What the levels that these lines have mean, a sentence each."""
    return [f"level {level}: holds {words}" for level, words in LEVELS.items() if (lines["level"] == level).any()]
