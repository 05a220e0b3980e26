"""What a person reads: text from outside (paths, names, messages) never counts as style.

Rich would read `[/v2]` in a path as a closing tag and `run[final]` as a style. So every console of the project is made
here, with markup off, and style is given beside the text: `say(console, ("error:", "bold red"), f" {message}")`.
tests/test_console.py holds the rule over all source files.
"""

from __future__ import annotations

import sys
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.errors import with_page

Part = str | tuple[str, str]  # text, or text and its style

PIPED_WIDTH = 160  # a file or a pipe has no width of its own; 80 columns would cut a table's headings
_of_stderr: list[Any] = []  # the stream, and its console
# An escape sequence in a file name would steer the terminal.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def stdout() -> Console:
    """Where results go. A pipe or a file gets `PIPED_WIDTH` columns."""
    console = _console(sys.stdout)
    if not console.is_terminal and not console.is_jupyter:
        console.width = PIPED_WIDTH
    return console


def stderr() -> Console:
    """Where plans, progress and errors go: the same console each time, so that lines appear above what is live."""
    if not _of_stderr or _of_stderr[0] is not sys.stderr:
        _of_stderr[:] = [sys.stderr, _console(sys.stderr, stderr=True)]
    return _of_stderr[1]


def to_file(file: IO[str], width: int | None = None) -> Console:
    """A console that writes to an open text file."""
    return _console(file, file=file, width=width)


def _console(stream: Any, **options: Any) -> Console:
    if hasattr(stream, "reconfigure"):  # a terminal that can't show a character gets its code, not a traceback
        stream.reconfigure(errors="backslashreplace")
    return Console(markup=False, highlight=False, emoji=False, **options)


def clean(text: str) -> str:
    """The text with control characters, and bytes of a path that are no UTF-8, shown as their codes."""
    return text.translate(_CONTROL).encode("utf-8", "backslashreplace").decode()


def styled(*parts: Part, style: str = "") -> Text:
    """Parts, each plain or (text, style), as one text."""
    return Text.assemble(*(clean(p) if isinstance(p, str) else (clean(p[0]), p[1]) for p in parts), style=style)


def say(console: Console, *parts: Part, style: str = "") -> None:
    """Print one line of parts. It is never wrapped, so that a path can be copied."""
    console.print(styled(*parts, style=style), soft_wrap=True)


def sentence(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def complain(error: Exception | str) -> None:
    """Print the one sentence that a user's error ends with, and the page that explains it, on stderr."""
    say(stderr(), ("error:", "bold red"), " ", with_page(error))


def table(title: str = "") -> Table:
    """An empty table in the project's look."""
    return Table(
        title=styled(title, style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        header_style="cyan",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def duration(seconds: float) -> str:
    """A rough time: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
