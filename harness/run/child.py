"""A process that does cells, as its parent sees it: a cell that dies takes nobody with it, and its exit code is kept.

The parent writes an order a line to the stdin of `python -m harness.run.worker` and reads an answer a line from its
stdout, both JSON. Light: no torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from harness.errors import AssetError, ConfigError

if TYPE_CHECKING:
    from harness.results.store import Store
    from harness.run.config import CellConfig
    from harness.run.sweep import Sweep

GRACE_S = 20.0  # for a cell that is stopped to let go of its lock; killed after that, it has lost no finished probe
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what somebody who wants a process to end sends it
INTERRUPTED = 130


class DiedError(RuntimeError):
    """The process of a cell has gone without a word."""


@dataclass(frozen=True)
class Answer:
    """How a cell ended. state: a word; message: a sentence, where there is more to say.

    peak: bytes of GPU memory that it reserved. fatal: the name of the error that the user must mend first.
    """

    state: str
    message: str | None = None
    peak: int = 0
    fatal: str | None = None

    @property
    def error(self) -> ConfigError | AssetError | None:
        """What ends the sweep, if anything does."""
        if self.fatal is None:
            return None
        return (AssetError if self.fatal == "AssetError" else ConfigError)(self.message)


def order(cell: CellConfig, sweep: Sweep, sharing: float) -> dict[str, Any]:
    """All that a process must know to do a cell, in plain types. sharing: how many use its GPU."""
    return {
        "cell": cell.plain,
        "root": str(sweep.store.root.absolute()),
        "logger": dict(sweep.logger),
        "again": asdict(sweep.again),
        "sharing": sharing,
    }


class Child:
    """One process; it is told of one cell at a time and ends with this one, however this one ends."""

    def __init__(self, changes: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        """changes: to this process's environment."""
        path = os.pathsep.join(p for p in dict.fromkeys(sys.path) if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.run.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path} | dict(changes or {}),
            cwd=cwd,
            start_new_session=True,  # a terminal's Ctrl-C reaches this process, which passes it on once
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders: IO[str] = self._process.stdin
        self.answers: IO[str] = self._process.stdout

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def give(self, order: Mapping[str, Any]) -> None:
        """Hand out a cell. Where the process has died, `answer` says so."""
        with suppress(BrokenPipeError):
            self._orders.write(json.dumps(order) + "\n")
            self._orders.flush()

    def answer(self) -> Answer | None:
        """Wait for how the cell ended; None where the process has died first."""
        line = self.answers.readline()
        return Answer(**json.loads(line)) if line.endswith("\n") else None

    def interrupt(self) -> None:
        """Ask the process to end: the cell under way keeps its finished probes and frees its lock."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def gone(self, within_s: float = GRACE_S) -> int:
        """See the process end, killed if it does not by itself; return its exit code."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return self._process.wait()  # its pipes stay open: a signal's handler may have come upon who reads them

    def end(self) -> int:
        """Hand out no more; return the exit code of the process once it has ended."""
        with suppress(BrokenPipeError):
            self._orders.close()
        code = self._process.wait()
        self.answers.close()
        return code


def ended(child: Child, order: Mapping[str, Any]) -> Answer:
    """Wait for how the one cell of this process ends, and for the process."""
    answer = child.answer()
    code = child.end()
    if answer is None:
        from harness.results.store import Store
        from harness.run.config import CellConfig

        answer = buried(code, CellConfig(order["cell"]), Store(order["root"]))
    return answer


def do(order: Mapping[str, Any], changes: Mapping[str, str], cwd: str) -> dict[str, Any]:
    """A cell in a process of its own, from beginning to end. Returns the fields of an `Answer`.

    changes: to the environment. cwd: the folder to run in, if there is one here.
    """
    child = Child(changes, Path(cwd) if Path(cwd).is_dir() else None)
    try:
        child.give(order)
        return vars(ended(child, order))
    except BaseException:  # cancelled
        child.interrupt()
        child.gone()
        raise


def buried(code: int, cell: CellConfig, store: Store) -> Answer:
    """What can be known of a cell whose process has ended with this code, recorded in it unless somebody stopped it."""
    if code == INTERRUPTED or -code in STOPS:
        return Answer("interrupted", "it was stopped: the same command goes on from there")
    words = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    guess = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
    return record(cell, store, DiedError(f"its process ended {words}{guess}"))


def record(cell: CellConfig, store: Store, error: DiedError) -> Answer:
    """Record why a cell ended that could not do it itself."""
    from harness.results.lock import LockedError
    from harness.run.cell import record_death

    with suppress(LockedError):  # another is at work on it already
        record_death(cell, store, error)
    return Answer("failed", str(error))
