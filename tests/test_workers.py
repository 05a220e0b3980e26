"""The order in which cells are handed to processes, and what becomes of those that ran out of memory beside others."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from rich.console import Console

from harness.results.store import Store
from harness.run import execute, workers
from harness.run.cell import state_of, versions
from harness.run.config import CellConfig, check
from harness.run.engines import local
from harness.run.nest import build_methods
from harness.run.overrides import composed, expand, rewrite
from harness.run.sweep import Sweep


def cells(*overrides: str) -> list[CellConfig]:
    """Every cell of a sweep, checked."""
    return [check(composed(combination)) for combination in expand(rewrite(list(overrides), True))]


def sweep(store: Store, many: int, **settings: object) -> Sweep:
    """What holds for all cells of a command."""
    return Sweep(store, {"name": "none"}, execute.GO_ON, many, {"name": "local"} | settings)


@pytest.fixture(scope="module")
def asked() -> list[CellConfig]:
    return cells(
        "model=smollm2-135m,smollm2-135m-relu", "method=teal,cats", "sparsity=0.3,0.5", "probe.names=[quality,sparsity]"
    )


def test_dense_cells_come_first_and_cells_of_one_fit_apart(asked: list[CellConfig]) -> None:
    found = workers.ordered(asked)
    assert [cell.method_name for cell in found[:2]] == ["dense", "dense"]
    assert {cell.id for cell in found} == {c.id for c in asked} | {c.dense_cell().id for c in asked}
    assert len({cell.id for cell in found}) == len(found)
    rest = [(cell.model_name, cell.method_name) for cell in found[2:]]
    assert [model for model, _ in itertools.groupby(rest, key=lambda pair: pair[0])] == [
        "smollm2-135m",
        "smollm2-135m-relu",
    ], "a process loads a model once"
    assert [method for _, method in rest[:4]] == ["teal", "cats", "teal", "cats"]


@pytest.mark.parametrize("gpus", [0, 2, 8])
def test_timed_cells_run_alone_and_what_lacked_memory_runs_again(
    asked: list[CellConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    timed = cells("method=teal", "sparsity=0.5", "tasks=none", "probe=latency")
    store, runs = Store(tmp_path), []
    unlucky = asked[0].id

    def run(part: list[CellConfig], sweep: Sweep, share: str, tally: workers.Tally) -> None:
        runs.append(([cell.id for cell in part], share, sweep.again))
        for cell in part:
            if cell.id == unlucky and len(runs) == 1:
                known = versions(build_methods(cell["method"]))
                with pytest.raises(torch.OutOfMemoryError), store.claim(unlucky, cell.plain, known):
                    raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(local, "run", run)
    monkeypatch.setattr(local, "gpu_count", lambda: gpus)
    workers.run_cells([*asked, *timed], sweep(store, 8), Console(quiet=True))
    (first, share, _), (alone, machine, _), *more = runs
    assert unlucky in first and share == "shared" and timed[0].id not in first
    assert alone == [timed[0].id] and machine == "machine"
    assert more == ([([unlucky], "gpu", execute.Rules(failed=True))] if gpus < 8 else []), "8 had a GPU each"


def test_a_sweep_of_which_nothing_is_missing_starts_no_process(
    asked: list[CellConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # cores are shared out where the user has not done it
    monkeypatch.setattr(local, "Child", None)
    done(asked[0], store := Store(tmp_path))
    done(asked[0].dense_cell(), store)
    workers.run_cells([asked[0]], sweep(store, 8), Console(quiet=True))


# ------------------------------------------------------------------------------- a cell and its dense cell


def fails(ran: list[str]) -> Callable[..., str]:
    """A `run_cell` under which every cell fails, and is recorded."""

    def run_cell(cell: CellConfig, store: Store, *_: object) -> str:
        ran.append(cell.id)
        with store.claim(cell.id, cell.plain, versions(build_methods(cell["method"]))):
            raise ZeroDivisionError("broken")

    return run_cell


def done(cell: CellConfig, store: Store) -> None:
    """As if the cell had been run."""
    with store.claim(cell.id, cell.plain, versions(build_methods(cell["method"]))) as claimed:
        claimed.finish()


def test_a_dense_cell_that_fails_is_not_run_again_for_each_cell_that_needs_it(
    asked: list[CellConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ran = Store(tmp_path), []
    monkeypatch.setattr(execute, "run_cell", fails(ran))
    mine = [cell for cell in asked if cell.model_name == "smollm2-135m"]
    dense = mine[0].dense_cell()
    ended = [execute.attempt(cell, store, {}, Console(quiet=True), execute.Rules(failed=True)) for cell in mine]
    assert len(mine) == 4 and ran == [dense.id]
    assert all(state == "failed" and str(words).startswith(execute.NO_DENSE) for state, words in ended)
    assert not any(store.view(cell.id).status for cell in mine), "they have not been run: the same command goes on"


def test_a_cell_waits_while_its_dense_cell_is_made(
    asked: list[CellConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, cell = Store(tmp_path), asked[0]
    dense = cell.dense_cell()
    looks: list[str] = []

    def sleep(_: float) -> None:  # the other process ends while this one looks a third time
        looks.append(state_of(dense, store))
        if len(looks) == 3:
            held.close()

    held = ExitStack()
    claimed = held.enter_context(store.claim(dense.id, dense.plain, versions(build_methods(dense["method"]))))
    held.callback(claimed.finish)
    monkeypatch.setattr(execute.time, "sleep", sleep)
    monkeypatch.setattr(execute, "run_cell", lambda cell, store, *_: done(cell, store) or "done")
    assert execute.attempt(cell, store, {}, Console(quiet=True)) == ("done", None)
    assert looks == ["locked"] * 3


def test_dependents_are_handed_out_after_their_dense_cell_has_ended(asked: list[CellConfig], tmp_path: Path) -> None:
    store, cell = Store(tmp_path), asked[0]
    dense = cell.dense_cell()
    other = next(c for c in asked if c.model_name != cell.model_name).dense_cell()
    queue = workers.Queue([dense, cell, other], store)
    assert queue.next([]) == dense
    assert queue.next([dense]) == other, "it is not even claimed yet: nobody may take it for failed"
    assert queue.next([dense]) is None
    done(dense, store)
    assert queue.next([]) == cell and not queue.waiting


def test_dependents_of_a_dense_cell_that_has_failed_are_not_handed_out(asked: list[CellConfig], tmp_path: Path) -> None:
    store, cell = Store(tmp_path), asked[0]
    dense = cell.dense_cell()
    with pytest.raises(ZeroDivisionError):
        fails([])(dense, store)
    queue = workers.Queue([cell], store)
    assert queue.next([]) is None
    assert queue.held_up == {cell.id: execute.NO_DENSE} and not queue.waiting


# ---------------------------------------------------------------------------------------- what runs again


@pytest.mark.parametrize(
    ("rules", "finished", "failed"),
    [
        (execute.GO_ON, False, False),
        (execute.Rules(failed=True), False, True),
        (execute.Rules(finished=True), True, True),
    ],
)
def test_what_has_ended_runs_again_where_the_user_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: execute.Rules, finished: bool, failed: bool
) -> None:
    store, ran = Store(tmp_path), []
    one, other = cells("method=random", "sparsity=0.3,0.4", "probe.names=[sparsity]")
    done(one, store)
    with pytest.raises(ZeroDivisionError):
        fails([])(other, store)
    monkeypatch.setattr(execute, "run_cell", lambda cell, *rest: ran.append((cell.id, rest[-1])) or "done")
    execute.run_all([one, other], store, {}, Console(quiet=True), rules)
    assert ran == [(cell.id, rules.finished) for cell, runs in ((one, finished), (other, failed)) if runs]


@pytest.mark.parametrize(("stop", "count"), [(False, 2), (True, 1)])
def test_a_failing_cell_ends_the_sweep_where_the_user_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: bool, count: int
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(execute, "run_cell", fails(ran))
    both = cells("method=random", "sparsity=0.3,0.4", "probe.names=[sparsity]")
    execute.run_all(both, Store(tmp_path), {}, Console(quiet=True), execute.Rules(stop=stop))
    assert len(ran) == count
