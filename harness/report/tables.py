"""The report's tables in HTML: sorted and filtered by the page's script, readable without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

SHORT = 48  # characters of a cell that is never broken


@dataclass(frozen=True)
class Column:
    """A column of a table of cells. form: a format of numbers, "x" at its end is a unit; None for text."""

    head: str
    key: str
    form: str | None = None
    error: str | None = None  # column of the standard error


def lines(name: str, columns: Sequence[Column], frame: pd.DataFrame) -> str:
    """A table of those columns that hold anything."""
    columns = [column for column in columns if column.key in frame and frame[column.key].notna().any()]
    body = []
    for line in frame.to_dict("records"):
        cells = []
        for column in columns:
            value = line[column.key]
            if column.form is None:
                text = "" if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)
                cells.append(words(text))
                continue
            text = "" if pd.isna(value) else f"{value:{column.form.removesuffix('x')}}"
            text += "×" if text and column.form.endswith("x") else ""
            error = line.get(column.error) if column.error else None
            if text and error is not None and not pd.isna(error):
                text += f" <i>± {error:{column.form.lstrip('+')}}</i>"
            cells.append(number(value, text, kind="n time" if column.key == "tpot_ms" else "n"))
        kind = [line.get("method") if line.get("method") == "dense" else "", line.get("execution")]
        kinds = " ".join(str(part) for part in kind if isinstance(part, str) and part in ("dense", "masked"))
        kinds = f' class="{kinds}"' if kinds else ""
        body.append(f"<tr{kinds}>{''.join(cells)}</tr>")
    return listing(name, {column.head: column.form is not None for column in columns}, body)


def words(text: str) -> str:
    """A cell of text."""
    return f"<td{' class=long' if len(text) > SHORT else ''}>{escape(text)}</td>"


def number(value: Any, text: str, label: str = "", kind: str = "n") -> str:
    """A cell that is sorted by a value and shows a text, HTML as it is. label: shown beside it on narrow screens."""
    # What is shown is sorted by, unless it begins with something else: of 1,420 the page's script would read 1.
    told = text.removeprefix("<span>").lstrip("+").partition(" ")[0]
    shown = (told[:1].isdigit() or told.startswith("-")) and "," not in told
    data = "" if pd.isna(value) or shown else f' data-value="{float(value):.5g}"'
    label = f' data-label="{label}"' if label else ""
    kind = kind if kind.isalnum() else f'"{kind}"'
    return f"<td class={kind}{data}{label}>{text}</td>"


def listing(
    name: str,
    head: Mapping[str, bool],
    body: Sequence[str],
    filtered: bool = True,
    choices: Mapping[str, bool] = {},
    wrapped: bool = False,
) -> str:
    """A table in a card.

    head: heading of each column -> whether it holds numbers. choices: columns to choose by -> whether it begins chosen.
    wrapped: cells of text may be broken into lines.
    """
    columns = "".join(
        f'<th scope="col"{" class=n" if numbers else ""}>{escape(text)}</th>' for text, numbers in head.items()
    )
    chosen = [(list(head).index(column), column, first) for column, first in choices.items()]
    return (
        f'<div class="card">{filter_box(name, chosen) if filtered else ""}'
        f'<div class="scroll" role="region" aria-label="{name.replace("-", " ")}">'
        f'<table class="sortable{"" if wrapped else " rows"}" id="{name}">'
        f"<thead><tr>{columns}</tr></thead><tbody>{chr(10).join(body)}</tbody></table></div></div>"
    )


def filter_box(name: str, choices: Sequence[tuple[int, str, bool]] = ()) -> str:
    """What filters the lines of `name`: words, and for (column, heading, first chosen) values that the script adds."""
    about = name.replace("-", " ")
    selects = "".join(
        f'<select data-column="{column}"{" data-first" if first else ""} aria-label="{escape(head)} in {about}">'
        f'<option value="">any {escape(head)}</option></select>'
        for column, head, first in choices
    )
    return (
        f'<div class="filter">{selects}<input type="search" data-of="{name}" '
        f'placeholder="filter: words that must occur" aria-label="filter {about}"><output></output></div>'
    )
