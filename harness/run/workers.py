"""Cells in several processes side by side, spread over the GPUs: `workers=N`.

This process hands out the cells, one at a time to whoever is free, so that a slow cell holds nobody up, and a cell only
after its dense cell has ended. Cells that time something run last, alone on their machine. So do those that ran out of
memory while they shared a GPU, one a GPU. Each process may take its share of the GPU's memory and no more: what one
keeps in its cache of freed blocks would else be what another fails for. A process that dies is replaced, and its cell
says so.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from rich.console import Console

from harness.console import say, to_file
from harness.errors import AssetError, ConfigError
from harness.results.identity import content_key
from harness.results.store import Store
from harness.run.cell import record_death, state_of
from harness.run.config import CellConfig
from harness.run.execute import NO_DENSE, Rules, attempt
from harness.run.machine import gpu_count, gpu_name
from harness.run.plan import with_dense

CONTEXT_BYTES = 0.8 * 2**30  # of a GPU's memory, what a process takes before its first tensor


class DiedError(RuntimeError):
    """The process of a cell has gone without a word."""


def run_cells(
    cells: Sequence[CellConfig], store: Store, logger: Mapping[str, Any], workers: int, again: Rules, console: Console
) -> None:
    """Do what is missing of the cells in `workers` processes; every cell records for itself how it ended.

    Raises the first `ConfigError` or `AssetError` of a cell (a full disk, a model that can't be read), and
    KeyboardInterrupt; both only after all processes have ended.
    """
    cells = ordered([replace(cell, index=None) for cell in cells])  # each process sees one GPU
    timed = [cell for cell in cells if cell.timed]
    others = [cell for cell in cells if not cell.timed]
    for part, many in ((others, workers), (timed, 1)):
        if _side_by_side(part, store, logger, many, again, console) and again.stop:
            return
    short = [cell for cell in others if store.view(cell.id).status.get("status") == "oom"]
    if short and (alone := max(1, gpu_count())) < workers:
        say(console, f"{len(short)} cells ran out of memory beside others: again, by {alone} at a time")
        _side_by_side(short, store, logger, alone, Rules(failed=True, stop=again.stop), console)


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


@dataclass
class Worker:
    """A process and the cell that it has in hand."""

    process: Any
    pipe: Connection
    device: str | None
    cell: CellConfig | None = None
    since: float = 0.0


@dataclass
class Queue:
    """What is still to be handed out, and what has ended."""

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


def _side_by_side(
    cells: Sequence[CellConfig], store: Store, logger: Mapping[str, Any], workers: int, again: Rules, console: Console
) -> bool:
    """Returns whether a cell has failed."""
    cells = [cell for cell in cells if not again.settled(state_of(cell, store))]
    if not cells:
        return False
    workers = min(workers, len(cells))
    devices = _gpus(cells)
    sharing = -(-workers // len(devices)) if devices else 1
    facts = (str(store.root), dict(logger), again, sharing)
    queue, crew = Queue(list(cells), store), []
    with _threads_each(workers):
        try:
            for rank in range(workers):
                crew.append(_start(devices[rank % len(devices)] if devices else None, facts))
            return _hand_out(queue, crew, len(cells), facts, again.stop, console)
        except KeyboardInterrupt:
            for worker in crew:
                if worker.process.pid is not None and worker.process.is_alive():
                    os.kill(worker.process.pid, signal.SIGINT)  # a terminal has told them already, a plain kill has not
            raise
        finally:
            for worker in crew:
                worker.pipe.close()  # nobody gets another cell
            for worker in crew:
                worker.process.join()


def _hand_out(
    queue: Queue, crew: list[Worker], total: int, facts: tuple[Any, ...], stop: bool, console: Console
) -> bool:
    """Give cells to the crew until all have ended. Raises what the user must mend, after the cells under way.

    facts: what each process is started with. stop: hand out no more once a cell has failed. Returns whether one has.
    """
    done, failed, fatal = 0, False, None
    while True:
        for worker in crew:
            if worker.cell is None and fatal is None:
                cell = queue.next([w.cell for w in crew if w.cell is not None])
                if cell is not None:
                    worker.cell, worker.since = cell, time.perf_counter()
                    with suppress(BrokenPipeError):  # it has died while idle: the end of its pipe says so below
                        worker.pipe.send(cell)
        for name in list(queue.held_up):
            done += 1
            say(console, f"[{done}/{total}] {name}  {queue.held_up.pop(name)}")
        busy = [worker for worker in crew if worker.cell is not None]
        if not busy:
            break
        ready = wait([worker.pipe for worker in busy])
        for at, worker in enumerate(crew):
            if worker.pipe not in ready or worker.cell is None:
                continue
            cell, seconds = worker.cell, time.perf_counter() - worker.since
            try:
                state, message, peak = worker.pipe.recv()
            except EOFError:
                state, message, peak = "failed", _bury(worker, cell, queue.store), 0
                crew[at] = _start(worker.device, facts)
            worker.cell = None
            if isinstance(message, ConfigError | AssetError):
                fatal = fatal or message
                continue
            failed = failed or state == "failed"
            if stop and failed:
                queue.waiting.clear()
            done += 1
            tail = (f", {peak / 2**30:.1f} GiB" if peak else "") + (f": {message}" if message else "")
            say(console, f"[{done}/{total}] {cell.id}  {state}, {seconds:.0f} s{tail}")
    if fatal is not None:
        raise fatal
    return failed


def _start(device: str | None, facts: tuple[Any, ...]) -> Worker:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(*facts, device, theirs), name="worker")
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    return Worker(process, ours, device)


def _bury(worker: Worker, cell: CellConfig, store: Store) -> str:
    """Record, and return, what can be known of a cell whose process has died."""
    worker.process.join()
    worker.pipe.close()
    code = worker.process.exitcode
    words = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    guess = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
    error = DiedError(f"its process ended {words}{guess}")
    record_death(cell, store, error)
    return str(error)


def _work(
    root: str, logger: Mapping[str, Any], again: Rules, sharing: int, device: str | None, pipe: Connection
) -> None:
    """One process: do cells until no more come. sharing: how many processes use this one's GPU."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before CUDA starts: the cells' own device=cuda is then this one
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, (total / sharing - CONTEXT_BYTES) / total))
    store = Store(root)
    with open(os.devnull, "w") as nowhere:
        console = to_file(nowhere)
        try:
            while True:
                cell = pipe.recv()
                ended: tuple[str, str | Exception | None]
                try:
                    ended = attempt(cell, store, logger, console, again)
                except (ConfigError, AssetError) as error:
                    ended = "failed", error
                peak = torch.cuda.max_memory_reserved() if device is not None else 0
                pipe.send((*ended, peak))
                if device is not None:  # a patched model is part of a reference cycle
                    gc.collect()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
        except (EOFError, BrokenPipeError):  # no more cells, or nobody to tell
            return
        except KeyboardInterrupt:
            sys.exit(130)


def _gpus(cells: Sequence[CellConfig]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one a GPU that this process sees and that the cells are meant for."""
    names = {cell["processor"] for cell in cells if cell["device"] == "cuda"}
    if not names:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else [str(index) for index in range(gpu_count())]
    return [known[index] for index in range(gpu_count()) if gpu_name(index) in names]


@contextmanager
def _threads_each(workers: int) -> Iterator[None]:
    """Processes that are started inside share the cores instead of all taking all of them."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    cores = len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // workers))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
