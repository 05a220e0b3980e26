"""`engine=ray` on this machine: one cell killed, the others done, then resumed; runs where Ray is installed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from pandas.testing import assert_frame_equal

from tests.chaos import left_processes, tiny_model
from tests.runner import Runner, measured
from tests.test_slurm import owner, until

pytest.importorskip("ray", reason="engine=ray can't be tested: pip install dynact[ray]")

LEVELS = [0.1, 0.2, 0.3]
KILLED = 0.1
SWEEP = [
    *("-m", "method=random", "method.random._target_=tests.dying.Waits", f"sparsity={','.join(map(str, LEVELS))}"),
    *("probe=sparsity", "probe.sparsity.windows=4", "tasks=none"),
]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A sweep of which one cell is killed, and the same command again."""
    folder = tmp_path_factory.mktemp("ray")
    runner = Runner(tiny_model(folder / "model"), folder)
    runner.env["DYNACT_CHAOS"] = str(runner.results)
    # What a busy machine needs before Ray's own processes have started.
    runner.env |= {"DYNACT_TEST_HOLDS": str(folder), "RAY_raylet_start_wait_time_s": "180"}
    runner.env["RAY_agent_register_timeout_ms"] = "180000"
    (folder / f"hold-{KILLED}").touch()
    process = runner.start(*SWEEP, "engine=ray")
    try:
        until(lambda: (folder / f"held-{KILLED}").exists(), process)
        os.kill(owner(runner.store, KILLED)[0], signal.SIGKILL)
        runner.out, runner.err = process.communicate(timeout=600)
        runner.code, runner.kept = process.returncode, runner.commits()
        runner.again = runner.run(*SWEEP, "engine=ray", "retry_failed=true")
    finally:
        process.kill()
    return runner


def test_a_cell_that_is_killed_takes_no_other_with_it(runner: Runner) -> None:
    assert runner.code == 1 and "2 of 3 cells have results" in runner.err, runner.err
    assert "its process ended by SIGKILL" in runner.err


def test_the_same_command_goes_on_and_leaves_what_one_process_leaves(runner: Runner, tmp_path: Path) -> None:
    assert "3 of 3 cells have results" in runner.again[1]
    assert runner.kept.items() <= runner.commits().items() and len(runner.commits()) == 3
    reference = Runner(runner.folder / "model", tmp_path)
    reference.run(*SWEEP)
    assert_frame_equal(measured(runner.table()), measured(reference.table()), check_exact=True)
    assert left_processes(runner.results) == []
