"""Progress bars on stderr for whatever takes longer than two seconds; silent where stderr is no terminal.

The libraries' own words are held back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar. total: number of items, where `items` has no length."""
    count = total if total is not None else len(items) if isinstance(items, Sequence) else None
    with _bar() as progress:
        yield from progress.track(items, description=description, total=count)


@contextmanager
def counting(total: int, description: str) -> Iterator[Callback]:
    """A bar advanced by hand: the value is a function that takes how many more are done."""
    with _bar() as progress:
        yield Callback(progress, progress.add_task(description, total=total))


class Callback:
    """Advances one bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self, more: int = 1) -> None:
        """So many more are done."""
        self._progress.advance(self._task, more)


def quiet_libraries() -> None:
    """What lm-eval and transformers say at every start is not news."""
    import transformers

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
