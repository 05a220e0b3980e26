"""Cells in several processes side by side, spread over the GPUs: `workers=N`.

Every process takes the next cell of one list, so that a slow cell holds nobody up. Dense cells come first, since the
others are compared with them. Cells that time something run last, alone on their machine. So do those that ran out of
memory while they shared a GPU, one a GPU. Each process may take its share of the GPU's memory and no more: what one
keeps in its cache of freed blocks would else be what another fails for.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import queue
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console

from harness.console import say, to_file
from harness.errors import AssetError, ConfigError, UnsupportedError
from harness.progress import quiet_libraries
from harness.results.store import LockedError, Store, content_key
from harness.run.cell import id_of, run_cell, state_of
from harness.run.config import CellConfig

POLL_S = 0.5
TIMED = ("latency",)  # probes whose numbers another process would spoil
CONTEXT_BYTES = 0.8 * 2**30  # of a GPU's memory, what a process takes before its first tensor


def run_cells(
    cells: Sequence[CellConfig], store: Store, logger: Mapping[str, Any], workers: int, retry: bool, console: Console
) -> None:
    """Do what is missing of the cells in `workers` processes; every cell records for itself how it ended.

    Raises the first `ConfigError` or `AssetError` of a cell (a full disk, a model that can't be read), and
    KeyboardInterrupt; both only after all processes have ended.
    """
    cells = ordered(cells)
    timed = [cell for cell in cells if set(TIMED) & set(cell["probe"]["names"])]
    others = [cell for cell in cells if cell not in timed]
    for part, many in ((others, workers), (timed, 1)):
        _side_by_side(part, store, logger, many, retry, console)
    short = [cell for cell in others if store.view(id_of(cell)).status.get("status") == "oom"]
    if short and (alone := max(1, torch.cuda.device_count())) < workers:
        say(console, f"{len(short)} cells ran out of memory beside others: again, by {alone} at a time")
        _side_by_side(short, store, logger, alone, True, console)


def ordered(cells: Sequence[CellConfig]) -> list[CellConfig]:
    """The cells and their dense twins, each once: dense ones first, then by model.

    Of a model's, first one cell of each fit, then the second of each, and so on: whoever wants a fit that another
    process is making waits for it.
    """
    found: dict[str, CellConfig] = {}
    for cell in cells:
        if "quality" in cell["probe"]["names"]:
            found.setdefault(id_of(cell.dense_twin()), cell.dense_twin())
        found.setdefault(id_of(cell), cell)
    models = list(dict.fromkeys(cell.model_name for cell in found.values()))
    seen: Counter[str] = Counter()
    ranks = {}
    for name, cell in found.items():
        options = {k: {o: v for o, v in m.items() if o != "sparsity"} for k, m in cell["method"].items()}
        fit = content_key({"model": cell["model"], "method": options, "calibration": cell["calibration"]})
        ranks[name] = (cell.method_name != "dense", models.index(cell.model_name), seen[fit])
        seen[fit] += 1
    return [found[name] for name in sorted(found, key=lambda name: ranks[name])]


def _side_by_side(
    cells: Sequence[CellConfig], store: Store, logger: Mapping[str, Any], workers: int, retry: bool, console: Console
) -> None:
    cells = [cell for cell in cells if state_of(cell, store) not in ("skip", "unsupported")]
    if not cells:
        return
    workers = min(workers, len(cells))
    context = mp.get_context("spawn")
    turn, said = context.Value("l", 0), context.Queue()
    devices = _gpus()
    processes = []
    with _threads_each(workers):
        for rank in range(workers):
            device = devices[rank % len(devices)] if devices else None
            sharing = -(-workers // len(devices)) if devices else 1
            facts = (cells, str(store.root), dict(logger), retry, device, sharing, turn, said)
            processes.append(context.Process(target=_work, args=facts, name=f"worker-{rank}"))
            processes[-1].start()
    fatal: Exception | None = None
    done = 0
    try:
        while any(process.is_alive() for process in processes) or not said.empty():
            try:
                name, state, seconds, peak, message = said.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if isinstance(message, ConfigError | AssetError):
                fatal = fatal or message
                continue
            done += 1
            tail = (f", {peak / 2**30:.1f} GiB" if peak else "") + (f": {message}" if message else "")
            say(console, f"[{done}/{len(cells)}] {name}  {state}, {seconds:.0f} s{tail}")
    except KeyboardInterrupt:
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGINT)  # a terminal has told them already, a plain kill has not
        raise
    finally:
        for process in processes:
            process.join()
    if fatal is not None:
        raise fatal


def _work(
    cells: Sequence[CellConfig],
    root: str,
    logger: Mapping[str, Any],
    retry: bool,
    device: str | None,
    sharing: int,
    turn: Any,
    said: Any,
) -> None:
    """One process: take cells until none is left. sharing: how many processes use this one's GPU."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # before CUDA starts: the cells' own device=cuda is then this one
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(max(0.0, (total / sharing - CONTEXT_BYTES) / total))
    quiet_libraries()
    store = Store(root)
    with open(os.devnull, "w") as nowhere:
        console = to_file(nowhere)
        try:
            while (at := _next(turn)) < len(cells):
                cell, start = cells[at], time.perf_counter()
                state, message = "done", None
                try:
                    _await_twin(cell, store)
                    state = run_cell(cell, store, logger, console, retry)
                except UnsupportedError as error:
                    state, message = "unsupported", str(error)
                except LockedError as error:
                    state, message = "locked", str(error)
                except (ConfigError, AssetError) as error:
                    with turn.get_lock():
                        turn.value = len(cells)  # nobody starts another
                    said.put((id_of(cell), "failed", 0.0, 0, error))
                    return
                except Exception as error:  # recorded in the cell with its traceback; the others go on
                    state, message = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                peak = torch.cuda.max_memory_reserved() if device is not None else 0
                said.put((id_of(cell), state, time.perf_counter() - start, peak, message))
                if device is not None:  # a patched model is part of a reference cycle
                    gc.collect()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
        except KeyboardInterrupt:
            sys.exit(130)


def _next(turn: Any) -> int:
    with turn.get_lock():
        turn.value += 1
        return turn.value - 1


def _await_twin(cell: CellConfig, store: Store) -> None:
    """Wait while another process is at work on the dense cell that this one is compared with."""
    if cell.method_name == "dense" or "quality" not in cell["probe"]["names"]:
        return
    while state_of(cell.dense_twin(), store) == "locked":
        time.sleep(POLL_S)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to, one a GPU that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def _threads_each(workers: int) -> Any:
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
