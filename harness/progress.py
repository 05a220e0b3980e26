"""Progress bars on stderr for whatever takes longer than two seconds; silent where stderr is no terminal.

The libraries' own words are held back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from harness.console import stderr

T = TypeVar("T")


def _bar(transient: bool = True) -> Progress:
    console = stderr()
    columns = (
        TextColumn("  {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar. total: number of items, where `items` has no length."""
    count = total if total is not None else len(items) if isinstance(items, Sequence) else None
    with _bar() as progress:
        yield from progress.track(items, description=description, total=count)


@contextmanager
def counting(total: int, description: str, done: int = 0, stays: bool = False) -> Iterator[Callback]:
    """A bar advanced by hand. done: where it starts. stays: it is still to be seen when it is over."""
    with _bar(transient=not stays) as progress:
        yield Callback(progress, progress.add_task(description, total=total, completed=done))


class Callback:
    """Advances one bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self, more: int = 1) -> None:
        """So many more are done."""
        self._progress.advance(self._task, more)

    def at(self, done: int) -> None:
        """So many are done in all."""
        self._progress.update(self._task, completed=done)


def quiet_libraries() -> None:
    """What lm-eval and transformers say at every start is not news."""
    import transformers

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
