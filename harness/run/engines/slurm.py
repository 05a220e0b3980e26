"""`engine=slurm`: job arrays through submitit, one job a cell, dense cells before those that are compared with them.

A job that is preempted, or that meets its time limit, is queued again and goes on from the last finished probe. Slurm
places, queues and counts; what a cell is and when it is done stays in the results folder, which all nodes must share.
Jobs outlive the command if that is killed; Ctrl-C and SIGTERM cancel them.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.results.lock import Lock, live_owner
from harness.run.child import Answer, DiedError, order, record
from harness.run.config import CellConfig
from harness.run.job import Task
from harness.run.sweep import Share, Sweep
from harness.run.workers import Tally, landed

if TYPE_CHECKING:
    from harness.results.store import Store

LONGEST_ARRAY = 1000  # Slurm's MaxArraySize is 1001 unless a site raises it
LOOK_S = 1.0
SETTLE_S = 10.0  # for the last jobs of a command that was killed
STOPPED = ("CANCELLED", "PREEMPTED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")  # no fault of the cell's


def check(settings: Mapping[str, Any], workers: int) -> None:
    """Whether submitit and Slurm's commands are there."""
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError("engine=slurm needs submitit: pip install dynact[slurm]")
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise ConfigError("engine=slurm needs sbatch and srun on this machine: start it where jobs are submitted from")
    if workers > 1:
        raise ConfigError("workers=N is for engine=local: say engine.sbatch.array_parallelism=N, the jobs at a time")


def shares(sweep: Sweep) -> bool:
    """A job has its GPUs and its memory to itself."""
    return False


def run(cells: Sequence[CellConfig], sweep: Sweep, share: Share, tally: Tally) -> None:
    """See `harness.run.workers.Engine`. Every cell is submitted at once; `on_error=stop` cancels what is left."""
    from submitit import SlurmExecutor

    # Pickles of submitit's own, for its jobs: in a folder that nobody else may write.
    folder = sweep.store.root.absolute() / "slurm" / uuid.uuid4().hex
    folder.mkdir(parents=True, mode=0o700)
    with Lock(folder, sweep.store.heartbeat_s, sweep.store.stale_s):
        _carry(SlurmExecutor(folder, max_num_timeout=sweep.engine["requeues"]), cells, sweep, share, tally)
    if not tally.failed:
        shutil.rmtree(folder, ignore_errors=True)


def tidy(store: Store) -> None:
    """Remove the folders of commands that are gone, once their jobs have ended too."""
    deadline = time.monotonic() + SETTLE_S
    while left := left_behind(store):
        for folder, under_way in left.items():
            if not under_way:
                shutil.rmtree(folder, ignore_errors=True)
        if not any(left.values()) or time.monotonic() > deadline:
            break
        time.sleep(LOOK_S)
    with suppress(OSError):  # it isn't there, or holds what is needed
        (store.root / "slurm").rmdir()


def left_behind(store: Store) -> dict[Path, bool]:
    """Folders of commands that are gone -> whether jobs of theirs are not. Logs stay where a cell has failed."""
    from harness.results.cells import BROKEN

    failed = any(store.view(name).status.get("status") in BROKEN for name in store.cells())
    found = {}
    for folder in sorted((store.root / "slurm").glob("*")):
        lock = folder / "lock.json"  # that of a command that was killed is still there
        if live_owner(lock, store.stale_s) is None and (lock.exists() or not failed):
            found[folder] = {path.name.partition("_")[0] for path in folder.glob("*_submitted.pkl")}
    if not found:
        return {}
    queued = _queued()
    return {folder: bool(queued is None or jobs & queued) for folder, jobs in found.items()}


def _queued() -> set[str] | None:
    """Arrays of this user that have not ended; None where Slurm doesn't say."""
    mine = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%F"]
    with suppress(OSError):
        shown = subprocess.run(mine, capture_output=True, text=True, check=False)
        return set(shown.stdout.split()) if not shown.returncode else None
    return None


def _carry(executor: Any, cells: Sequence[CellConfig], sweep: Sweep, share: Share, tally: Tally) -> None:
    dense = [cell for cell in cells if cell.method_name == "dense"]
    rest = [cell for cell in cells if cell.method_name != "dense"]
    jobs: dict[Any, CellConfig] = {}
    try:
        jobs |= _submit(executor, dense, sweep, share)
        first = frozenset(_array(job) for job in jobs)
        jobs |= _submit(executor, rest, sweep, share, first)
        for cell in jobs.values():
            tally.begin(cell)
        _follow(jobs, sweep, tally)
    finally:
        if jobs:  # interrupted, or not to go on
            subprocess.run(["scancel", *sorted({_array(job) for job in jobs})], check=False)


def _submit(
    executor: Any, cells: Sequence[CellConfig], sweep: Sweep, share: Share, after: frozenset[str] = frozenset()
) -> dict[Any, CellConfig]:
    """Jobs for the cells, which begin once the arrays `after` have ended, well or not."""
    jobs: dict[Any, CellConfig] = {}
    for start in range(0, len(cells), LONGEST_ARRAY):
        part = cells[start : start + LONGEST_ARRAY]
        for on_gpu, group in itertools.groupby(sorted(part, key=_on_gpu), key=_on_gpu):
            members = list(group)
            executor.update_parameters(**_parameters(sweep.engine["sbatch"], on_gpu, share, after))
            with executor.batch():
                submitted = [executor.submit(Task(order(cell, sweep, 1))) for cell in members]
            jobs |= zip(submitted, members, strict=True)
    return jobs


def _on_gpu(cell: CellConfig) -> bool:
    return cell["device"] == "cuda"


def _parameters(sbatch: Mapping[str, Any], on_gpu: bool, share: Share, after: frozenset[str]) -> dict[str, Any]:
    """What submitit is told: its own parameters, and any other long option of sbatch."""
    from submitit.slurm.slurm import _make_sbatch_string

    given = {name: value for name, value in sbatch.items() if value is not None}
    if not on_gpu:
        given = {name: value for name, value in given.items() if not name.startswith("gpus") and name != "gres"}
    if share == "machine":
        given["exclusive"] = True
    if after:
        given["dependency"] = ":".join(["afterany", *sorted(after)])
    known = set(inspect.signature(_make_sbatch_string).parameters)
    others = {name: value for name, value in given.items() if name not in known}
    return {name: value for name, value in given.items() if name in known} | {"additional_parameters": others}


def _array(job: Any) -> str:
    """The number that all jobs of an array share."""
    return str(job.job_id).partition("_")[0]


def _follow(jobs: dict[Any, CellConfig], sweep: Sweep, tally: Tally) -> None:
    """Wait for the jobs, dropping those that have ended, until none is left or no more is to be done."""
    while jobs and not tally.over:
        for job in [job for job in jobs if job.done()]:
            cell = jobs.pop(job)
            tally.end(cell, _answer(job, cell, sweep.store))
        tally.look()
        time.sleep(LOOK_S)


def _answer(job: Any, cell: CellConfig, store: Store) -> Answer:
    """What a job that has ended returned, or what Slurm says of its end, recorded in the cell."""
    from submitit.core.utils import UncompletedJobError

    try:
        return landed(Answer(**job.result()), cell, store)
    except UncompletedJobError:
        state = str(job.state).split()[0]
    if state in STOPPED:
        return Answer("interrupted", f"its job {job.job_id} ended as {state}: the same command goes on from there")
    return record(cell, store, DiedError(f"its job {job.job_id} ended as {state}, see {job.paths.stderr}"))
