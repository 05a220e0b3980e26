"""What engines are told and what they make of it. tests/test_slurm.py, test_ray.py and test_cli.py run them."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from harness.errors import ConfigError
from harness.results.store import Store
from harness.run import child, plan, worker
from harness.run.cell import versions
from harness.run.child import Answer, Child
from harness.run.config import CellConfig, check
from harness.run.engines import ray, slurm
from harness.run.execute import GO_ON, Rules
from harness.run.nest import build_methods
from harness.run.overrides import composed, expand, rewrite
from harness.run.sweep import Sweep
from harness.run.workers import Tally, landed
from harness.values import choice

ROOT = Path(__file__).resolve().parents[1]


def cells(*overrides: str) -> list[CellConfig]:
    return [check(composed(combination)) for combination in expand(rewrite(list(overrides), True))]


def sweep(store: Store, again: Rules = GO_ON, **engine: object) -> Sweep:
    return Sweep(store, {"name": "none", "group": None}, again, 1, {"name": "slurm"} | engine)


def test_an_order_says_all_and_is_the_same_cell_at_the_other_end(tmp_path: Path) -> None:
    (cell,) = cells("method=teal", "sparsity=0.5", "tasks=[piqa]", "tasks.num_fewshot=2")[:1]
    told = json.loads(json.dumps(child.order(cell, sweep(Store(tmp_path), Rules(finished=True)), 2)))
    assert CellConfig(told["cell"]).id == cell.id and CellConfig(told["cell"]).plain == cell.plain
    assert Rules(**told["again"]) == Rules(finished=True) and told["root"] == str(tmp_path)


@pytest.mark.parametrize("engine", ["slurm", "ray", "local"])
def test_who_runs_a_cell_is_no_part_of_it(engine: str) -> None:
    plain = cells("method=random", "sparsity=0.5", "probe=sparsity", "tasks=none")
    assert [
        c.id for c in cells("method=random", "sparsity=0.5", "probe=sparsity", "tasks=none", f"engine={engine}")
    ] == [c.id for c in plain]


def test_cells_are_planned_for_a_gpu_that_this_machine_has_not() -> None:
    given = ["method=random", "sparsity=0.5", "probe=sparsity", "tasks=none", "engine=slurm"]
    far, near = "engine.processor=NVIDIA_H100_80GB_HBM3", "device=cpu"
    (cell,) = cells(*given, far)
    assert (cell["device"], cell["dtype"], cell["processor"]) == ("cuda", "bfloat16", "NVIDIA H100 80GB HBM3")
    assert cells(*given, far, near)[0]["device"] == "cpu"


def test_a_machine_with_another_processor_refuses_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = cells("method=random", "sparsity=0.5", "engine=slurm", "engine.processor=NVIDIA_H100", "probe=sparsity")
    monkeypatch.setattr("harness.run.machine.gpu_count", lambda: 0)
    with pytest.raises(ConfigError, match="was sent to has no GPU"):
        worker._check_processor(cell)
    monkeypatch.setattr("harness.run.machine.gpu_count", lambda: 1)
    monkeypatch.setattr("harness.run.machine.gpu_name", lambda index: "NVIDIA A100")
    with pytest.raises(ConfigError, match="say engine.processor=NVIDIA_A100"):
        worker._check_processor(cell)
    monkeypatch.setattr("harness.run.machine.gpu_name", lambda index: "NVIDIA H100")
    worker._check_processor(cell)


# --------------------------------------------------------------------------------- what is missing, in one sentence


@pytest.mark.parametrize(("engine", "package"), [(slurm, "slurm"), (ray, "ray")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, engine: object, package: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install dynact\[{package}\]"):
        engine.check({"cpus": 1, "gpus": 1}, 1)


def test_engines_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="needs sbatch and srun on this machine"):
        slurm.check({}, 1)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    for engine in (slurm, ray):
        with pytest.raises(ConfigError, match="workers=N is for engine=local"):
            engine.check({"cpus": 1, "gpus": 1}, 2)
    for key, value in (("cpus", -1), ("gpus", 0), ("gpus", "half")):
        with pytest.raises(ConfigError, match=f"engine.{key} (is|must)"):
            ray.check({"cpus": 1, "gpus": 1} | {key: value}, 1)


def test_an_unknown_engine_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="engine=slrum is unknown"):
        plan.read(["engine=slrum"], multirun=False)
    choice("local", "engine", [path.stem for path in (ROOT / "conf/engine").glob("*.yaml")])
    assert {path.stem for path in (ROOT / "conf/engine").glob("*.yaml")} == {
        path.stem for path in (ROOT / "harness/run/engines").glob("[!_]*.py")
    }


# ------------------------------------------------------------------------------------------------ how cells end


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        (-signal.SIGKILL, "failed", "ended by SIGKILL, perhaps for lack of memory"),
        (-signal.SIGSEGV, "failed", "ended by SIGSEGV"),
        (3, "failed", "ended with exit code 3"),
        (-signal.SIGTERM, "interrupted", None),
        (130, "interrupted", None),
    ],
)
def test_the_exit_code_of_a_dead_process_is_kept(tmp_path: Path, code: int, state: str, words: str | None) -> None:
    (cell,), store = cells("method=random", "sparsity=0.5", "probe=sparsity", "tasks=none"), Store(tmp_path)
    answer = child.buried(code, cell, store)
    assert answer.state == state
    if words is None:  # who stops a process means no failure: the same command goes on
        assert not store.cells()
    else:
        assert words in store.view(cell.id).status["message"] and words in str(answer.message)


def test_what_the_user_must_mend_ends_the_sweep_and_failures_where_asked() -> None:
    (cell,) = cells("method=random", "sparsity=0.5", "probe=sparsity", "tasks=none")
    tally = Tally(2, Console(quiet=True))
    tally.end(cell, Answer("failed", "x"))
    assert tally.failed and not tally.over
    tally.end(cell, Answer("failed", "the disk is full", fatal="ConfigError"))
    assert tally.over and isinstance(tally.fatal, ConfigError) and tally.done == 1
    tally = Tally(2, Console(quiet=True), stop=True)
    tally.end(cell, Answer("failed", "x"))
    assert tally.over and tally.fatal is None


def test_what_is_done_elsewhere_must_be_seen_here(tmp_path: Path) -> None:
    (cell,), store = cells("method=random", "sparsity=0.5", "probe=sparsity", "tasks=none"), Store(tmp_path)
    answer = landed(Answer("done"), cell, store)
    assert answer.state == "failed" and "the same on every node" in str(answer.message)
    with store.claim(cell.id, cell.plain, versions(build_methods(cell["method"]))) as claimed:
        claimed.finish()
    assert landed(Answer("done"), cell, store) == Answer("done")


def test_a_process_without_a_parent_ends_and_one_that_is_told_to(tmp_path: Path) -> None:
    idle = Child()
    assert idle.end() == 0
    busy = Child()
    busy.give({"cell": {}})  # that it is no cell at all it would find out only after its imports
    busy._orders.close()
    assert busy._process.wait(60) == child.INTERRUPTED


# ------------------------------------------------------------------------------------------------------- Slurm


def test_sbatch_is_told_what_the_config_says() -> None:
    pytest.importorskip("submitit")
    given = {"partition": "gpu", "account": None, "gpus_per_node": 1, "time": 60, "reservation": "tuesday"}
    told = slurm._parameters(given, True, "shared", frozenset())
    assert told == {k: given[k] for k in ("partition", "gpus_per_node", "time")} | {
        "additional_parameters": {"reservation": "tuesday"}
    }
    told = slurm._parameters(given, False, "machine", frozenset({"7", "5"}))
    assert "gpus_per_node" not in told and told["exclusive"] is True and told["dependency"] == "afterany:5:7"


def test_an_array_of_dense_cells_comes_first_and_interruption_cancels_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit")
    arrays: list[tuple[list[str], str | None]] = []
    cancelled: list[list[str]] = []

    class Executor:
        def __init__(self, *_: object, **__: object) -> None: ...

        def update_parameters(self, **parameters: object) -> None:
            self.parameters = parameters

        @contextmanager
        def batch(self):
            arrays.append(([], self.parameters.get("dependency")))
            yield

        def submit(self, task: object) -> SimpleNamespace:
            names = arrays[-1][0]
            names.append(CellConfig(task.order["cell"]).method_name)
            return Job(job_id=f"{len(arrays)}_{len(names) - 1}")

    class Job(SimpleNamespace):
        __hash__ = object.__hash__

        def done(self) -> bool:
            raise KeyboardInterrupt

    monkeypatch.setattr(submitit, "SlurmExecutor", Executor)
    monkeypatch.setattr(slurm.subprocess, "run", lambda command, **_: cancelled.append(command))
    asked = cells("method=random", "sparsity=0.3,0.5", "tasks=none", "probe.names=[quality]")
    settings = {"requeues": 1, "sbatch": {"time": 1}}
    with pytest.raises(KeyboardInterrupt):
        everything = [asked[0].dense_cell(), *asked]
        slurm.run(everything, sweep(Store(tmp_path), **settings), "shared", Tally(3, Console(quiet=True)))
    assert arrays == [(["dense"], None), (["random", "random"], "afterany:1")]
    assert cancelled == [["scancel", "1", "2"]]
