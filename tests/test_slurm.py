"""`engine=slurm` on a real cluster of two nodes: one cell killed, one preempted, one at its time limit, all resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from pandas.testing import assert_frame_equal

from harness.results.lock import machine
from harness.results.store import Store
from harness.run.engines import slurm
from tests import slurm_cluster
from tests.chaos import tiny_model
from tests.forks import Forks, Process
from tests.runner import ROOT, Runner, measured

pytest.importorskip("submitit", reason="engine=slurm can't be tested: pip install dynact[slurm]")
WHY_NOT = slurm_cluster.missing()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"engine=slurm can't be tested: {WHY_NOT}")

LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
KILLED, PREEMPTED, LIMITED = 0.1, 0.2, 0.3
SWEEP = [
    "-m",
    "method=random",
    "method.random._target_=tests.dying.Waits",
    f"sparsity={','.join(map(str, LEVELS))}",
    "probe=sparsity",
    "probe.sparsity.windows=4",
    "tasks=none",
]
SLURM = ["engine=slurm", "engine.sbatch.cpus_per_task=1", "engine.sbatch.time=10"]
PATIENCE_S = 600.0


def until(what: Callable[[], bool], process: subprocess.Popen[str] | Process) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, "".join(process.communicate())
        time.sleep(0.1)


def owner(store: Store, level: float) -> tuple[int, dict[str, str]]:
    """The process that holds a cell, and its environment."""
    (lock,) = store.root.glob(f"cells/*_s{level}_*/lock.json")
    pid = json.loads(lock.read_text())["pid"]
    environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return pid, dict(entry.split("=", 1) for entry in environment if "=" in entry)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """The same sweep in one process, never stopped."""
    runner = Runner(model, tmp_path_factory.mktemp("reference"), forks)
    process = runner.start(*SWEEP)  # it runs beside the cluster
    yield runner
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def runner(reference: Runner, model: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("slurm")
    runner = Runner(model, folder, forks)
    (folder / "holds").mkdir()
    for level in (KILLED, PREEMPTED, LIMITED):
        (folder / f"holds/hold-{level}").touch()
    with slurm_cluster.cluster(folder / "logs") as environment:
        places = ("PATH", "SLURM_CONF")
        runner.env |= {"PYTHONPATH": str(ROOT)}  # jobs do not begin in run.py's folder, and the method is in tests
        runner.env |= {name: environment[name] for name in places} | {"DYNACT_TEST_HOLDS": str(folder / "holds")}
        process = runner.start(*SWEEP, *SLURM)
        try:
            until(lambda: len(list((folder / "holds").glob("held-*"))) == 3, process)
            os.kill(owner(runner.store, KILLED)[0], signal.SIGKILL)
            # As Slurm does to a job some seconds before its limit, which is a minute at least.
            os.kill(psutil.Process(owner(runner.store, LIMITED)[0]).ppid(), signal.SIGUSR2)
            (killed,) = runner.results.glob(f"cells/*_s{KILLED}_*")  # recorded before its node is emptied
            until(lambda: runner.store.view(killed.name).status["status"] == "failed", process)
            node = owner(runner.store, PREEMPTED)[1]["SLURMD_NODENAME"]
            urgent = ["sbatch", "-p", "urgent", "--exclusive", "-w", node, "-o", "/dev/null", "--wrap", "true"]
            subprocess.run(urgent, env=environment, check=True, capture_output=True)
            runner.out, runner.err = process.communicate(timeout=PATIENCE_S)
            runner.code = process.returncode
            jobs = ["scontrol", "show", "job", "-o"]
            runner.jobs = subprocess.run(jobs, env=environment, capture_output=True, text=True).stdout.splitlines()
            runner.kept = runner.commits()
            runner.again = runner.run(*SWEEP, *SLURM, "retry_failed=true")
            left = ["squeue", "-h"]
            runner.queue = subprocess.run(left, env=environment, capture_output=True, text=True).stdout
        finally:
            process.kill()
        yield runner


def test_a_cell_that_is_killed_takes_no_other_with_it(runner: Runner) -> None:
    assert runner.code == 1 and "7 of 8 cells have results" in runner.err, runner.err
    assert "failed" in runner.err and "its process ended by SIGKILL" in runner.err
    assert sum("JobName=dynact" in job and "ArrayTaskId=" in job for job in runner.jobs) == 8, "one array of 8"


def test_preemption_and_the_time_limit_put_a_job_back_in_the_queue(runner: Runner) -> None:
    lives = {job.split("ArrayTaskId=")[1].split()[0]: job for job in runner.jobs if "JobName=dynact" in job}
    for level in (PREEMPTED, LIMITED):
        job = lives[str(LEVELS.index(level))]
        assert "Restarts=1" in job and "JobState=COMPLETED" in job


def test_the_same_command_does_what_is_missing_and_repeats_nothing(runner: Runner) -> None:
    assert "8 of 8 cells have results" in runner.again[1]
    assert runner.kept.items() <= runner.commits().items() and len(runner.commits()) == 8


def test_the_table_is_that_of_an_uninterrupted_run_and_nothing_is_left(runner: Runner, reference: Runner) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not (reference.results / "table.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert_frame_equal(measured(runner.table()), measured(reference.table()), check_exact=True)
    assert runner.queue == ""
    for pattern in ("cells/*/lock.json", "cells/*/probes/.*", "slurm/*"):
        assert not list(runner.results.glob(pattern))


def test_what_killed_commands_left_goes_once_its_jobs_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)

    def folder(name: str, job: int, owner: str | None) -> Path:
        made = tmp_path / "slurm" / name
        made.mkdir(parents=True)
        (made / f"{job}_0_submitted.pkl").touch()
        if owner is not None:
            (made / "lock.json").write_text(owner)
        return made

    alive = {"host": "h", "machine": "elsewhere", "pid": 1, "since": "now"}
    killed = folder("killed", 1, json.dumps(alive | {"machine": machine(), "process_started": 0.0}))
    running = folder("running", 2, "{}")
    interrupted = folder("interrupted", 3, None)
    theirs = folder("theirs", 4, json.dumps(alive))
    monkeypatch.setattr(slurm, "_queued", lambda: None)
    assert set(slurm.left_behind(store).values()) == {True}, "Slurm does not answer"
    monkeypatch.setattr(slurm, "_queued", lambda: {"2"})
    monkeypatch.setattr(slurm, "SETTLE_S", 0.0)
    assert slurm.left_behind(store) == {interrupted: False, killed: False, running: True}
    with pytest.raises(ValueError), store.claim("c", {}, {}):
        raise ValueError("no luck")
    assert slurm.left_behind(store) == {killed: False, running: True}, "the log of a failed cell is kept"
    slurm.tidy(store)
    assert not killed.exists() and all(kept.exists() for kept in (running, interrupted, theirs))
