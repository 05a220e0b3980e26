"""`engine=local`: `workers=N` processes on this machine, spread over its GPUs; each is replaced if it dies.

A process does one cell after the other, so that it loads a model once. Each may take its share of a GPU's memory and no
more: what one keeps in its cache of freed blocks would else be what another fails for.
"""

from __future__ import annotations

import os
import selectors
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.run.child import GRACE_S, Child, buried, order
from harness.run.config import CellConfig
from harness.run.machine import gpu_count, gpu_name
from harness.run.sweep import Share, Sweep
from harness.run.workers import Queue, Tally

if TYPE_CHECKING:
    from harness.results.store import Store


LOOK_S = 1.0


def check(settings: Mapping[str, Any], workers: int) -> None:
    """There is always this machine."""


def shares(sweep: Sweep) -> bool:
    """Whether there are more processes than GPUs."""
    return max(1, gpu_count()) < sweep.workers


def tidy(store: Store) -> None:
    """Processes end with this one."""


@dataclass
class Seat:
    """A place for one process, and the cell that it has in hand."""

    child: Child
    changes: Mapping[str, str]  # to its environment
    cell: CellConfig | None = None


def run(cells: Sequence[CellConfig], sweep: Sweep, share: Share, tally: Tally) -> None:
    """See `harness.run.workers.Engine`."""
    many = {"shared": sweep.workers, "gpu": max(1, gpu_count()), "machine": 1}[share]
    many, gpus = min(many, len(cells)), _gpus(cells)
    sharing = -(-many // len(gpus)) if gpus else 1
    queue, seats = Queue(list(cells), sweep.store), []
    try:
        for rank in range(many):
            changes = _threads(many)
            if gpus:
                changes["CUDA_VISIBLE_DEVICES"] = ",".join(gpus) if share == "machine" else gpus[rank % len(gpus)]
            seats.append(Seat(Child(changes), changes))
        while True:
            for seat in seats:
                if seat.cell is None:
                    cell = queue.ready([s.cell for s in seats if s.cell is not None], tally)
                    if cell is not None:
                        seat.cell = cell
                        tally.begin(cell)
                        seat.child.give(order(cell, sweep, sharing))
            busy = [seat for seat in seats if seat.cell is not None]
            if not busy:
                break
            for seat in _answered(busy):
                _take(seat, sweep, tally)
            tally.look()
        for seat in seats:
            seat.child.end()
    except BaseException:
        _stop(seats)
        raise


def _answered(busy: Sequence[Seat]) -> list[Seat]:
    """Wait, but not long, for the processes that have something to say, or have died."""
    with selectors.DefaultSelector() as selector:
        for seat in busy:
            selector.register(seat.child.answers, selectors.EVENT_READ, seat)
        return [key.data for key, _ in selector.select(LOOK_S)]


def _take(seat: Seat, sweep: Sweep, tally: Tally) -> None:
    """Take the answer of a process, or bury it and start another."""
    assert seat.cell is not None
    answer = seat.child.answer()
    if answer is None:
        answer = buried(seat.child.end(), seat.cell, sweep.store)
        seat.child = Child(seat.changes)
    cell, seat.cell = seat.cell, None
    tally.end(cell, answer)


def _stop(seats: Sequence[Seat]) -> None:
    """End all processes before their time; those that have a cell in hand let go of it."""
    for seat in seats:
        if seat.cell is not None:
            seat.child.interrupt()
    for seat in seats:
        seat.child.gone(0 if seat.cell is None else GRACE_S)


def _gpus(cells: Sequence[CellConfig]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one a GPU that this process sees and that the cells are meant for."""
    names = {cell["processor"] for cell in cells if cell["device"] == "cuda"}
    if not names:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else [str(index) for index in range(gpu_count())]
    return [known[index] for index in range(gpu_count()) if gpu_name(index) in names]


def _threads(processes: int) -> dict[str, str]:
    """Processes share the cores instead of all taking all of them, unless the user has said how."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))}
