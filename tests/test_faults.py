"""What goes wrong in one cell is one sentence there, and the rest of the sweep is done."""

from __future__ import annotations

import errno
import io
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.console import to_file
from harness.errors import ConfigError
from harness.fitting.scratch import Scratch
from harness.results.collect import collect, headline
from harness.results.store import Store
from harness.run import plan
from harness.run.config import CellConfig
from harness.run.execute import Pace, run_all
from methods.random import Random


@dataclass(frozen=True)
class Faulty(Random):
    """A method that breaks where it is told to."""

    where: str = "nowhere"

    name = "faulty"
    needs = "calibration"

    def _break(self, where: str) -> None:
        if self.where == where:
            raise ZeroDivisionError(f"broken in {where}")
        if self.where == f"oom in {where}":
            raise torch.OutOfMemoryError("no room")

    def fit(self, view: Any, calibration: Any) -> dict[str, torch.Tensor]:
        self._break("fit")
        return {}

    @contextmanager
    def attach(self, view: Any, state: Any) -> Any:
        self._break("attach")
        with super().attach(view, state):
            yield
        self._break("exit")

    def select(self, *given: Any) -> Any:
        self._break("select")
        return super().select(*given)


def cells(folder: Path, text: Path, *overrides: str) -> list[CellConfig]:
    given = [
        *("model=local", f"model.path={folder}", "tasks=none", "device=cpu", "dtype=float32", "probe.names=[quality]"),
        *(
            f"calibration.path={text}",
            f"probe.perplexity.path={text}",
            "calibration.tokens=64",
            "calibration.window=32",
        ),
        *("probe.perplexity.window=32", "probe.perplexity.windows=2", "probe.perplexity.kl_windows=1"),
    ]
    return plan.read([*given, *overrides], multirun=True).cells


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(60)))
    return path


@pytest.mark.parametrize("where", ["fit", "attach", "select", "exit", "oom in select"])
def test_a_method_that_raises_fails_alone(tiny_folder: Path, text: Path, tmp_path: Path, where: str) -> None:
    target = "+method.faulty._target_=tests.test_faults.Faulty"
    (bad,) = cells(tiny_folder, text, "method=dense", target, f"+method.faulty.where={where}", "sparsity=0.4")
    (good,) = cells(tiny_folder, text, "method=random", "sparsity=0.4")
    store, out = Store(tmp_path), io.StringIO()
    run_all([bad, good], store, {"name": "none", "group": None}, to_file(out, width=200))
    status = "oom" if where.startswith("oom") else "failed"
    ended = store.view(bad.id).status
    message = "no room" if status == "oom" else f"broken in {where}"
    assert (ended["status"], ended["message"]) == (status, message)
    assert store.view(good.id).status["status"] == "done" and message in out.getvalue()
    assert "Traceback" not in out.getvalue()
    lines = headline(collect(tmp_path)).set_index("cell_id")
    assert lines.loc[bad.id, "status"] == status and lines.loc[good.id, "status"] == "ok"


def test_a_dense_cell_whose_file_is_altered_fails_who_needs_it_and_nobody_else(
    tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    first, second = cells(tiny_folder, text, "method=random", "sparsity=0.4,0.5")
    store, logger, nowhere = Store(tmp_path), {"name": "none", "group": None}, to_file(io.StringIO())
    dense = first.dense_cell()
    assert dense is not None
    run_all([dense], store, logger, nowhere)
    stored = store.view(dense.id).path / "probes/perplexity/tensors.safetensors"
    whole = stored.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    stored.write_bytes(
        whole[:8] + whole[8 : 8 + length].replace(b"F32", b"Q99").replace(b"I64", b"Q99") + whole[8 + length :]
    )
    (alone,) = cells(tiny_folder, text, "method=random", "sparsity=0.5", "probe.perplexity.kl_windows=0", "seed=1")
    run_all([first, alone], store, logger, nowhere)
    ended = store.view(first.id).status
    assert (
        ended["status"] == "failed" and str(stored) in ended["message"] and "cut short or altered" in ended["message"]
    )
    assert store.view(alone.id).status["status"] == "done"
    stored.write_bytes(whole[:-9])  # cut short is found by a look, and the probe made again
    assert store.state(dense.id, store.view(dense.id).status["versions"]) == "partial"
    run_all([second], store, logger, nowhere)
    assert store.view(second.id).status["status"] == "done"
    assert stored.read_bytes() == whole


def test_a_full_disk_under_the_layers_of_a_fit_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match="the disk is full"):
        Scratch(tmp_path / "k.layers").part("p", lambda: {"w": torch.ones(3)})
    assert list((tmp_path / "k.layers").iterdir()) == []


def test_a_sweep_says_how_far_it_has_come() -> None:
    pace = Pace(3)
    assert pace.line("done", 10.0) == "[1/3] done, 10 s, 2 left, about 20 s"
    assert pace.line("failed", 200.0) == "[2/3] failed, 3 min, 1 left, about 2 min"
    assert pace.line("done", 0.2) == "[3/3] done, 1 s"
