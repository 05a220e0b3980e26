"""What goes wrong in one cell is one sentence there, and the rest of the sweep is done."""

from __future__ import annotations

import errno
import io
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from harness.claims.study import study_of
from harness.console import to_file
from harness.errors import ConfigError
from harness.figures.select import drawable
from harness.fitting.scratch import Scratch
from harness.report.terminal import print_summary
from harness.results.collect import collect, headline
from harness.results.samples import read_samples
from harness.results.store import Store
from harness.run import plan
from harness.run.config import CellConfig
from harness.run.execute import Pace, outcome, run_all
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
        if self.where == f"memory in {where}":
            raise MemoryError("no room")

    def fit(self, view: Any, calibration: Any) -> dict[str, torch.Tensor]:
        self._break("fit")
        return {}

    @contextmanager
    def attach(self, view: Any, state: Any) -> Any:
        self._break("attach")

        def poison(_: torch.nn.Module, __: tuple, logits: torch.Tensor) -> torch.Tensor | None:
            whole = logits.dim() == 3  # of a forward pass; perplexity takes final hidden states and computes its own
            now = self.where == "not a number" or (whole and self.where == "not a number later")
            return logits * math.nan if now else None

        handle = view.model.get_output_embeddings().register_forward_hook(poison, prepend=True)
        try:
            with super().attach(view, state):
                yield
        finally:
            handle.remove()
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


@pytest.mark.parametrize("where", ["fit", "attach", "select", "exit", "oom in select", "memory in fit"])
def test_a_method_that_raises_fails_alone(tiny_folder: Path, text: Path, tmp_path: Path, where: str) -> None:
    target = "+method.faulty._target_=tests.test_faults.Faulty"
    (bad,) = cells(tiny_folder, text, "method=dense", target, f"+method.faulty.where={where}", "sparsity=0.4")
    (good,) = cells(tiny_folder, text, "method=random", "sparsity=0.4")
    store, out = Store(tmp_path), io.StringIO()
    run_all([bad, good], store, {"name": "none", "group": None}, to_file(out, width=200))
    status = "oom" if " in " in where else "failed"
    ended = store.view(bad.id).status
    message = "no room" if status == "oom" else f"broken in {where}"
    assert (ended["status"], ended["message"]) == (status, message)
    assert store.view(good.id).status["status"] == "done" and message in out.getvalue()
    assert "Traceback" not in out.getvalue()
    lines = headline(collect(tmp_path)).set_index("cell_id")
    assert lines.loc[bad.id, "status"] == status and lines.loc[good.id, "status"] == "ok"


@pytest.mark.parametrize(
    ("where", "probes", "words"),
    [
        ("not a number", "quality", "NaN, not a number, for window 0 of the perplexity text"),
        ("not a number later", "quality,sparsity", "NaN, not a number, for the held-out text"),
    ],
)
def test_numbers_of_a_cell_whose_logits_are_nan_count_nowhere(
    tiny_folder: Path, text: Path, tmp_path: Path, where: str, probes: str, words: str
) -> None:
    target = "+method.faulty._target_=tests.test_faults.Faulty"
    given = ["sparsity=0.4", "method=dense", f"probe.names=[{probes}]", "probe.sparsity.windows=2"]
    (bad,) = cells(tiny_folder, text, *given, target, f"+method.faulty.where={where}")
    dense = bad.dense_cell()
    assert dense is not None
    store, out = Store(tmp_path), io.StringIO()
    run_all([dense, bad], store, {"name": "none", "group": None}, to_file(out, width=200))
    view = store.view(bad.id)
    assert view.status["status"] == "invalid" and words in view.status["message"] and words in out.getvalue()
    assert view.probes() == (["perplexity"] if "," in probes else []), "what was whole stays for the next attempt"
    table = collect(tmp_path)
    (row,) = table[table["cell_id"] == bad.id].to_dict("records")
    assert (row["probe"], row["metric"], row["status"]) == ("status", "status", "invalid") and pd.isna(row["value"])
    assert headline(table).set_index("cell_id").loc[bad.id, "status"] == "invalid"
    assert bad.id not in set(drawable(table, limited=True)["cell_id"])
    assert bad.id not in set(study_of(table, read_samples(tmp_path), limited=True).rows["cell_id"])
    assert store.state(bad.id, view.status["versions"]) == "failed"
    summary = io.StringIO()
    print_summary({bad.id: outcome(view)}, to_file(summary, width=200))
    assert f"{bad.id}: invalid: the logits of" in summary.getvalue()


def test_nothing_is_timed_whose_logits_are_nan(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    target = "+method.faulty._target_=tests.test_faults.Faulty"
    given = ["sparsity=0.4", "method=dense", "probe.names=[latency]", target, "+method.faulty.where=not a number later"]
    (bad,) = cells(tiny_folder, text, *given)
    store = Store(tmp_path)
    run_all([bad], store, {"name": "none", "group": None}, to_file(io.StringIO()))
    status = store.view(bad.id).status
    assert status["status"] == "invalid" and "NaN, not a number, for the prompts that are timed" in status["message"]


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
    rows = stored.with_name("rows.parquet")
    before = store.view(dense.id).read("perplexity")
    rows.write_bytes(rows.read_bytes()[:-9])
    assert store.state(dense.id, store.view(dense.id).status["versions"]) == "partial"
    run_all([dense], store, logger, nowhere)
    assert_frame_equal(store.view(dense.id).read("perplexity"), before, check_exact=True)


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
