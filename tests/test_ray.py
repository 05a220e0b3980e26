"""`engine=ray`: a cell killed, a node lost, all resumed, here and on a cluster; runs where Ray is installed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from pandas.testing import assert_frame_equal

from tests.chaos import left_processes, tiny_model
from tests.runner import Runner, measured
from tests.test_slurm import owner, until

pytest.importorskip("ray", reason="engine=ray can't be tested: pip install dynact[ray]")

from harness.run.engines.ray import _needs, shares  # noqa: E402  without Ray there is nothing to test

LEVELS = [0.1, 0.2, 0.3]
KILLED = 0.1
SWEEP = [
    *("-m", "method=random", "method.random._target_=tests.dying.Waits", f"sparsity={','.join(map(str, LEVELS))}"),
    *("probe=sparsity", "probe.sparsity.windows=4", "tasks=none"),
]

# What a busy machine needs before Ray's own processes have started.
PATIENT = {"RAY_raylet_start_wait_time_s": "180", "RAY_agent_register_timeout_ms": "180000"}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A sweep of which one cell is killed, and the same command again."""
    folder = tmp_path_factory.mktemp("ray")
    runner = Runner(tiny_model(folder / "model"), folder)
    runner.env["DYNACT_CHAOS"] = str(runner.results)
    runner.env |= {"DYNACT_TEST_HOLDS": str(folder)} | PATIENT
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


def ports() -> dict[str, int]:
    """Free ones for a node's agents: Ray gives up on those that have not chosen one after 15 s."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in names]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return dict(zip(names, (each.getsockname()[1] for each in held), strict=True))


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    """A sweep on a cluster of two nodes, named by its address, of which one is lost with a cell on it."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("cluster")
    runner = Runner(tiny_model(folder / "model"), folder)
    (folder / f"hold-{KILLED}").touch()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (PATIENT | {"DYNACT_TEST_HOLDS": str(folder)}).items():
            patch.setenv(name, value)
            runner.env[name] = value
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | ports())
        nodes = [cluster.add_node(num_cpus=1, **ports()) for _ in range(2)]
        process = runner.start(*SWEEP, "engine=ray", f"engine.address={cluster.address}")
        try:
            until(lambda: (folder / f"held-{KILLED}").exists(), process)
            raylets = {node.all_processes["raylet"][0].process.pid: node for node in nodes}
            above = psutil.Process(owner(runner.store, KILLED)[0]).parents()
            (place,) = {parent.pid for parent in above} & raylets.keys()
            cluster.remove_node(raylets[place], allow_graceful=False)
            runner.out, runner.err = process.communicate(timeout=600)
            runner.code = process.returncode
        finally:
            process.kill()
            cluster.shutdown()
    yield runner


def test_a_cell_whose_node_is_lost_is_begun_again_on_another(lost: Runner) -> None:
    assert lost.code == 0 and "3 of 3 cells have results" in lost.err, lost.err
    assert len(lost.commits()) == 3 and not list(lost.results.glob("cells/*/lock.json"))


@pytest.mark.parametrize(
    ("device", "share", "gpus", "needs", "sharing"),
    [
        ("cuda", "shared", 0.5, {"num_cpus": 2, "num_gpus": 0.5}, 2),
        ("cuda", "gpu", 0.5, {"num_cpus": 2, "num_gpus": 1}, 1),
        ("cuda", "shared", 2, {"num_cpus": 2, "num_gpus": 2}, 1),
        ("cuda", "machine", 0.5, {"num_cpus": 16, "num_gpus": 8}, 1),
        ("cpu", "shared", 0.5, {"num_cpus": 2, "num_gpus": 0}, 1),
        ("cpu", "machine", 0.5, {"num_cpus": 64, "num_gpus": 0}, 1),
    ],
)
def test_what_a_cell_takes_of_a_node(
    monkeypatch: pytest.MonkeyPatch, device: str, share: str, gpus: float, needs: dict, sharing: float
) -> None:
    """Two cells of half a GPU each share one; a timed cell takes all of the largest node that has what it needs."""
    import ray

    nodes = [{"CPU": 16, "GPU": 8}, {"CPU": 4}, {"CPU": 64}]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Resources": each, "Alive": True} for each in nodes])
    assert _needs({"device": device}, {"cpus": 2, "gpus": gpus}, share) == (needs, sharing)  # type: ignore[arg-type]
    assert shares(SimpleNamespace(engine={"gpus": gpus})) is (gpus < 1)  # type: ignore[arg-type]
