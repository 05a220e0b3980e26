"""The order in which cells are handed to processes, and what becomes of those that ran out of memory beside others."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from rich.console import Console

from harness.results.store import Store
from harness.run import workers
from harness.run.config import CellConfig, check
from harness.run.overrides import composed, expand, rewrite


def cells(*overrides: str) -> list[CellConfig]:
    """Every cell of a sweep, checked."""
    return [check(composed(combination)) for combination in expand(rewrite(list(overrides), True))]


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


def test_timed_cells_run_alone_and_what_lacked_memory_runs_again(
    asked: list[CellConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = cells("method=teal", "sparsity=0.5", "tasks=none", "probe=latency")
    store, runs = Store(tmp_path), []
    unlucky = asked[0].id

    def side_by_side(part: list[CellConfig], *facts: object) -> None:
        runs.append(([cell.id for cell in part], facts[2], facts[3]))
        for cell in part:
            if cell.id == unlucky and len(runs) == 1:
                with pytest.raises(torch.OutOfMemoryError), store.claim(unlucky, cell.plain, {}):
                    raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(workers, "_side_by_side", side_by_side)
    workers.run_cells([*asked, *timed], store, {"name": "none"}, 8, False, Console(quiet=True))
    (first, many, _), (alone, one, _), (again, few, retry) = runs
    assert unlucky in first and many == 8 and timed[0].id not in first
    assert alone == [timed[0].id] and one == 1
    assert again == [unlucky] and few == max(1, torch.cuda.device_count()) and retry


def test_a_sweep_of_which_nothing_is_missing_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # cores are shared out where the user has not done it
    monkeypatch.setattr(workers.mp, "get_context", None)
    workers.run_cells([], Store(tmp_path), {"name": "none"}, 8, False, Console(quiet=True))
