"""Run what a plan lacks in this process, one cell after the other, and say how everything ended."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from harness.console import duration, say, sentence
from harness.errors import AssetError, ConfigError, DamagedError, MeasurementError, UnsupportedError
from harness.progress import quiet_libraries, sweeping
from harness.report.terminal import in_brief
from harness.results.cells import CellView
from harness.results.lock import LockedError
from harness.results.store import State, Store
from harness.run.cell import run_cell, state_of
from harness.run.config import CellConfig
from harness.run.plan import NEEDS_RUN

POLL_S = 0.5
NO_DENSE = "not run: what it is compared with (its dense cell) has no results"


class DenseError(RuntimeError):
    """The dense cell that a cell is compared with has no results."""


@dataclass(frozen=True)
class Rules:
    """Which cells that have ended run again, and what a cell that fails means for the others.

    failed: those that have failed. finished: all, from the start. stop: end at the first that fails.
    """

    failed: bool = False
    finished: bool = False
    stop: bool = False

    def settled(self, state: State) -> bool:
        """Whether a cell in this state is left as it is."""
        if self.finished:
            return False
        return state in ("skip", "unsupported") or (state == "failed" and not self.failed)


GO_ON = Rules()


def rules(settings: Mapping[str, Any]) -> Rules:
    """What the keys of a run say."""
    return Rules(settings["retry"], settings["force"], settings["on_error"] == "stop")


def run_all(
    cells: Iterable[CellConfig], store: Store, logger: Mapping[str, Any], console: Console, again: Rules = GO_ON
) -> None:
    """Do what is missing of each cell. A cell that fails is recorded and, unless `again.stop`, ends nothing else.

    What the user must mend (`ConfigError`, `AssetError`: a full disk, a model that can't be read) ends it.
    """
    asked = list(cells)
    left = [cell for cell in asked if not again.settled(state_of(cell, store))]
    pace = Pace(len(left))
    with sweeping(len(left)) if len(left) > 1 else nullcontext() as bar:
        for cell in asked:
            start, settled = time.perf_counter(), again.settled(state_of(cell, store))
            state, _ = attempt(cell, store, logger, console, again)
            if not settled and bar is not None:
                line = pace.line(state, time.perf_counter() - start)
                say(console, f"  {line}{found(cell, state, store)}", style="dim")
                bar.left(pace.about())
                bar()
            if again.stop and state == "failed":
                return


def found(cell: CellConfig, state: str, store: Store) -> str:
    """The last results in a few words, or nothing."""
    return f"; {words}" if state == "done" and (words := in_brief(store.view(cell.id))) else ""


@dataclass
class Pace:
    """How far a sweep has come. total: cells that are to run."""

    total: int
    done: int = 0
    spent: float = 0.0

    def line(self, state: str, seconds: float) -> str:
        """Count a cell that has ended: how, how many are left, and how long they take at the pace so far."""
        self.done, self.spent = self.done + 1, self.spent + seconds
        return f"[{self.done}/{self.total}] {state}, {duration(seconds)}{self.rest()}"

    def rest(self) -> str:
        """How many are left and for how long; nothing where none is."""
        left = self.total - self.done
        return f", {left} left, {self.about()}" if left > 0 else ""

    def about(self) -> str:
        """How long the rest will take; nothing where none is left."""
        left = self.total - self.done
        return f"about {duration(left * self.spent / self.done)}" if left > 0 else ""


def attempt(
    cell: CellConfig, store: Store, logger: Mapping[str, Any], console: Console, again: Rules = GO_ON
) -> tuple[str, str | None]:
    """Do what is missing of a cell, and of its dense cell before; returns how it ended, in a word and in words."""
    before = state_of(cell, store)
    if again.settled(before):
        return before, None
    quiet_libraries()
    try:
        _dense_first(cell, store, logger, console)
        return run_cell(cell, store, logger, console, again.finished), None
    except DamagedError as error:  # of a file of this cell or its dense one: the others need not end for it
        state, style, message = "failed", "red", sentence(error)
    except (ConfigError, AssetError):
        raise
    except UnsupportedError as error:
        state, style = "unsupported", "yellow"
        message = sentence(error)
    except LockedError as error:
        state, style = "locked", "yellow"
        message = sentence(error)
    except Exception as error:  # recorded in the cell with its traceback; the sweep goes on
        state, style = "failed", "red"
        told = isinstance(error, DenseError | MeasurementError)  # in a sentence of ours
        message = sentence(error) if told else f"{type(error).__name__}: {sentence(error)}"
    say(console, f"  {state}: {message}", style=style)
    return state, message


def _dense_first(cell: CellConfig, store: Store, logger: Mapping[str, Any], console: Console) -> None:
    """Have the dense cell's results there: wait while another process makes them, make them where nobody does."""
    dense = cell.dense_cell()
    if dense is None:
        return
    while (state := state_of(dense, store)) != "skip":
        if state == "locked":
            time.sleep(POLL_S)
        elif state in NEEDS_RUN:
            attempt(dense, store, logger, console)
        else:  # it has failed, and would fail again for every cell that needs it
            raise DenseError(f"{NO_DENSE}: {dense.id}")


def outcome(cell: CellView) -> tuple[str, str]:
    """How a cell ended, and in which words."""
    status = cell.status
    if not status:
        return "failed", NO_DENSE
    if status["status"] == "running":
        if (cell.path / "lock.json").exists():
            return "locked", "another process is at work on it"
        return "failed", "ended early: the same command goes on from there"
    return status["status"], status.get("message", "")
