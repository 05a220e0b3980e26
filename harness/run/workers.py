"""The rules by which cells are spread, whatever engine carries them (`engine=`, one file each in harness/run/engines).

A cell runs after its dense cell; of the cells that share a fit one comes early, so that the others find it made; cells
that time something run last, alone on their machine; those that ran out of memory while they shared a GPU run again,
one a GPU. How processes are placed, queued and started again is the engine's business.
"""

from __future__ import annotations

import importlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from harness.console import say
from harness.progress import Bar, sweeping
from harness.results.identity import content_key
from harness.run.cell import state_of, under_way
from harness.run.execute import NO_DENSE, Pace, Rules, found
from harness.run.plan import with_dense
from harness.run.sweep import Share, Sweep

if TYPE_CHECKING:
    from rich.console import Console

    from harness.results.store import Store
    from harness.run.child import Answer
    from harness.run.config import CellConfig


MOST = 4  # cells under way that are named


class Engine(Protocol):
    """A file of harness/run/engines."""

    def check(self, settings: Mapping[str, Any], workers: int) -> None:
        """Raise `ConfigError` with one sentence where the engine can't run. Light: torch is not loaded yet."""

    def shares(self, sweep: Sweep) -> bool:
        """Whether cells run side by side in the memory of one GPU (or of one machine without)."""

    def run(self, cells: Sequence[CellConfig], sweep: Sweep, share: Share, tally: Tally) -> None:
        """Do the cells, each after its dense cell; tell `tally` how each ended.

        Raises KeyboardInterrupt once no process of its own is left, or all are told to end.
        """

    def tidy(self, store: Store) -> None:
        """Remove what commands that were killed have left, where that is the engine's."""


def engine(settings: Mapping[str, Any]) -> Engine:
    """The engine that a config names."""
    return cast(Engine, importlib.import_module(f"harness.run.engines.{settings['name']}"))


def run_cells(cells: Sequence[CellConfig], sweep: Sweep, console: Console) -> None:
    """Do what is missing of the cells; every cell records for itself how it ended.

    Raises the first `ConfigError` or `AssetError` of a cell (a full disk, a model that can't be read) after those that
    were under way, and KeyboardInterrupt.
    """
    carrier = engine(sweep.engine)
    _in_parts(carrier, cells, sweep, console)
    carrier.tidy(sweep.store)


def _in_parts(carrier: Engine, cells: Sequence[CellConfig], sweep: Sweep, console: Console) -> None:
    cells = ordered([replace(cell, index=None) for cell in cells])  # each process sees its own GPU only
    alone = [cell for cell in cells if cell.timed or cell["model"].get("device_map")]  # a model over all GPUs
    others = [cell for cell in cells if cell not in alone]
    for part, share in ((others, "shared"), (alone, "machine")):
        if _side_by_side(carrier, part, sweep, cast(Share, share), console) and sweep.again.stop:
            return
    short = [cell for cell in others if sweep.store.view(cell.id).status.get("status") == "oom"]
    if short and carrier.shares(sweep):
        say(console, f"{len(short)} cells ran out of memory beside others: again, one a GPU")
        again = replace(sweep, again=Rules(failed=True, stop=sweep.again.stop))
        _side_by_side(carrier, short, again, "gpu", console)


def _side_by_side(carrier: Engine, cells: Sequence[CellConfig], sweep: Sweep, share: Share, console: Console) -> bool:
    """Returns whether a cell has failed."""
    cells = [cell for cell in cells if not sweep.again.settled(state_of(cell, sweep.store))]
    if not cells:
        return False
    with sweeping(len(cells)) as bar:
        tally = Tally(len(cells), console, sweep.again.stop, sweep.store, bar)
        carrier.run(cells, sweep, share, tally)
    if tally.fatal is not None:
        raise tally.fatal
    return tally.failed


def ordered(cells: Sequence[CellConfig]) -> list[CellConfig]:
    """The cells and their dense cells, each once: dense ones first, then by model.

    Of a model's, first one cell of each fit, then the second of each, and so on: whoever wants a fit that another
    process is making waits for it.
    """
    found = with_dense(cells)
    models = list(dict.fromkeys(cell.model_name for cell in found.values()))
    seen: Counter[str] = Counter()
    ranks = {}
    for name, cell in found.items():
        options = {k: {o: v for o, v in m.items() if o != "sparsity"} for k, m in cell["method"].items()}
        fit = content_key({"model": cell["model"], "method": options, "calibration": cell["calibration"]})
        ranks[name] = (cell.method_name != "dense", models.index(cell.model_name), seen[fit])
        seen[fit] += 1
    return [found[name] for name in sorted(found, key=lambda name: ranks[name])]


def landed(answer: Answer, cell: CellConfig, store: Store) -> Answer:
    """The answer of another machine, if what it says is done is to be seen on this one."""
    if answer.state != "done" or state_of(cell, store) == "skip":
        return answer
    return replace(
        answer, state="failed", message=f"it was done, but not in {store.root}: is that folder the same on every node?"
    )


class Tally:
    """How many cells have ended, and how: a line each as they do, and on a terminal what is under way.

    total: of cells. stop: at the first that fails. store: where the cells say what they are at, and what they found.
    """

    def __init__(
        self,
        total: int,
        console: Console,
        stop: bool = False,
        store: Store | None = None,
        bar: Bar | None = None,
    ) -> None:
        self.total, self.done, self.failed, self.stop = total, 0, False, stop
        self._store, self._bar = store, bar
        self._start = time.monotonic()
        self._under_way: dict[str, CellConfig] = {}
        self.fatal: Exception | None = None  # what the user must mend: no more cells are begun
        self._console = console
        self._since: dict[str, float] = {}

    @property
    def over(self) -> bool:
        """Whether no more cells are to be begun."""
        return self.fatal is not None or (self.stop and self.failed)

    def begin(self, cell: CellConfig) -> None:
        """The cell has been handed out."""
        self._since[cell.id] = time.monotonic()
        self._under_way[cell.id] = cell
        self.look()

    def look(self) -> None:
        """Tell what is under way, by what the cells say of themselves in the results folder."""
        if self._store is None or self._bar is None or not self._bar.seen:
            return
        said = []
        for name, cell in self._under_way.items():
            status = self._store.view(name).status
            if status.get("status") == "running" and "probe" in status:
                said.append(under_way(cell, status["probe"]))
        more = f" and {len(said) - MOST}" if len(said) > MOST else ""
        self._bar.tell(", ".join(said[:MOST]) + more)

    def end(self, cell: CellConfig, answer: Answer) -> None:
        """The cell has ended."""
        self._under_way.pop(cell.id, None)
        if answer.error is not None:
            self.fatal = self.fatal or answer.error
            return
        self.failed = self.failed or answer.state == "failed"
        took = f", {time.monotonic() - self._since.get(cell.id, time.monotonic()):.0f} s"
        tail = (f", {answer.peak / 2**30:.1f} GiB" if answer.peak else "") + (
            f": {answer.message}" if answer.message else ""
        )
        last = found(cell, answer.state, self._store) if self._store is not None else ""
        self._say(f"{cell.id}  {answer.state}{took}{tail}", last)

    def never(self, name: str, why: str) -> None:
        """The cell of this id will not run."""
        self._say(f"{name}  {why}")

    def _say(self, words: str, last: str = "") -> None:
        self.done += 1
        pace = Pace(self.total, self.done, time.monotonic() - self._start)
        say(self._console, f"[{self.done}/{self.total}] {words}{pace.rest()}{last}")
        if self._bar is not None:
            self._bar.left(pace.about())
            self._bar()
        self.look()


@dataclass
class Queue:
    """What is still to be handed out."""

    waiting: list[CellConfig]
    store: Store
    held_up: dict[str, str] = field(default_factory=dict)  # by id: why a cell was never run

    def next(self, under_way: Sequence[CellConfig]) -> CellConfig | None:
        """The first cell whose dense cell has ended; None where there is none now. Drops those it ended badly for."""
        unfinished = {cell.id for cell in (*self.waiting, *under_way)}
        for cell in list(self.waiting):
            dense = cell.dense_cell()
            if dense is not None and dense.id in unfinished:
                continue
            self.waiting.remove(cell)
            if dense is not None and state_of(dense, self.store) in ("failed", "unsupported"):
                self.held_up[cell.id] = NO_DENSE
                continue
            return cell
        return None

    def ready(self, under_way: Sequence[CellConfig], tally: Tally) -> CellConfig | None:
        """`next`, unless the sweep is over; cells that are held up are told of."""
        if tally.over:
            self.waiting.clear()
        cell = self.next(under_way)
        for name in list(self.held_up):
            tally.never(name, self.held_up.pop(name))
        return cell
