"""Progress bars on stderr, with the time that is left, for whatever takes longer than two seconds.

They are silent where stderr is no terminal. A bar inside of another one is a line below it; a sweep's own stands above
all of them and says what is under way. The libraries' own words are held back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from harness.console import clean, stderr

T = TypeVar("T")

PATIENCE_S = 2.0  # before a bar is shown
PAUSE_S = 0.2  # between drawings of a bar inside of one that is drawn by hand only
_sweeps: list[Bar] = []
_shown: list[Progress] = []  # the bars on the terminal: one at most, whose lines are the bars inside of one another


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a bar. total: number of items, where `items` has no length."""
    count = total if total is not None else len(items) if isinstance(items, Sequence) else None
    with counting(count, description) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def counting(
    total: int | None,
    description: str,
    done: int = 0,
    stays: bool = False,
    still: bool = False,
    left: str | None = None,
) -> Iterator[Bar]:
    """A bar advanced by hand. done: where it starts. stays: it is still to be seen when it is over.

    still: nothing is drawn but when it advances, for work that is timed. left: what is said of the time that is left,
    where that is not to be guessed.
    """
    bar = Bar(total, description, done, stays, still, left)
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def sweeping(total: int) -> Iterator[Bar]:
    """The bar of a sweep of so many cells, to be seen from the start. Its `tell` says what is under way.

    It is drawn by hand only: cells are timed beside it.
    """
    with counting(total, "cells", still=True, left="") as bar:
        bar.show()
        _sweeps.append(bar)
        try:
            yield bar
        finally:
            _sweeps.remove(bar)


def tell(words: str) -> None:
    """Say what is under way beside the sweep's bar, if there is one."""
    for bar in _sweeps:
        bar.tell(words)


class Remaining(TimeRemainingColumn):
    """The time that is left by the pace of the last half minute; of a sweep, whose cells take longer, as it says."""

    def render(self, task: Task) -> Text:
        """See rich."""
        return Text(task.fields["left"]) if "left" in task.fields else super().render(task)


class Bar:
    """A line of a bar: called, it goes on."""

    def __init__(
        self, total: int | None, description: str, done: int, stays: bool, still: bool, left: str | None
    ) -> None:
        self._total, self._description, self._done = total, description, done
        self._stays, self._still, self._start = stays, still, time.monotonic()
        self._first = done
        self._progress: Progress | None = None
        self._own = False
        self._drawn, self._told, self._left = 0.0, "", left

    def __call__(self, more: int = 1) -> None:
        """So many more are done."""
        self.at(self._done + more)

    def left(self, words: str) -> None:
        """Say how long the rest will take."""
        if self._progress is not None:
            self._progress.update(self._task, left=words)

    def at(self, done: int, total: int | None = None) -> None:
        """So many are done in all. total: of now so many, where that changes."""
        self._done, self._total = done, total if total is not None else self._total
        if self._progress is None and time.monotonic() - self._start >= PATIENCE_S:
            self.show()
        if self._progress is not None:
            now = time.monotonic()
            again = self._still or (not self._progress.live.auto_refresh and now - self._drawn > PAUSE_S)
            self._drawn = now if again else self._drawn
            self._progress.update(self._task, completed=done, total=self._total, refresh=again)

    @property
    def seen(self) -> bool:
        """Whether it is on a terminal."""
        return self._progress is not None

    def tell(self, words: str) -> None:
        """Say more beside the bar."""
        if self._progress is not None and words != self._told:
            self._told = words
            said = f"{self._description}  {clean(words)}" if words else self._description
            self._progress.update(self._task, description=said, refresh=True)

    def show(self) -> None:
        """Have the bar seen, where stderr is a terminal."""
        if not _shown:
            console = stderr()
            if not console.is_terminal:
                return
            columns = (
                TextColumn("  {task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                Remaining(),
            )
            made = Progress(*columns, console=console, transient=not self._stays, auto_refresh=not self._still)
            made.start()
            _shown.append(made)
            self._own = True
        self._progress = _shown[0]
        self._task = self._progress.add_task(self._description, total=self._total, completed=self._first)
        if self._left is not None:
            self._progress.update(self._task, left=self._left)
        self._progress.refresh()

    def close(self) -> None:
        """The bar is over."""
        if self._progress is None:
            return
        if self._own:
            self._progress.stop()
            _shown.remove(self._progress)
        else:
            self._progress.remove_task(self._task)


def quiet_libraries() -> None:
    """What lm-eval and transformers say at every start is not news."""
    import transformers

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
