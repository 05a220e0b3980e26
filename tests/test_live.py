"""What a sweep shows while it runs: on a terminal cells, the current probe and the time left; elsewhere plain lines."""

from __future__ import annotations

import os
import pty
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.console import stderr
from harness.progress import Bar, counting, sweeping, tell
from harness.results.store import Store
from harness.run.execute import run_all
from harness.run.workers import Tally
from tests.test_faults import cells, text

__all__ = ["text"]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, width: int = 120) -> Iterator[list[str]]:
    """stderr is a pseudo-terminal; what it showed is in the list afterwards."""
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    shown: list[str] = []
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield shown
        stream.flush()
        os.set_blocking(ours, False)
        parts = []
        try:
            while part := os.read(ours, 1 << 16):
                parts.append(part)
        except BlockingIOError:
            pass
        shown.append(ESCAPES.sub("", b"".join(parts).decode()))
    os.close(ours)


def test_a_sweep_on_a_terminal_shows_its_cells_the_probe_and_what_was_found(
    tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = cells(tiny_folder, text, "method=random", "sparsity=0.4", "probe.names=[quality,sparsity]")
    dense = found[0].dense_cell()
    assert dense is not None
    with terminal(monkeypatch) as shown:
        run_all([dense, *found], Store(tmp_path), {"name": "none", "group": None}, stderr())
    said = shown[0]
    assert "dense: quality, 1 of 2" in said and "random 0.4: sparsity, 2 of 2" in said
    assert "0/2" in said and "1/2" in said and "cells" in said
    assert re.search(r"\[1/2\] done, \d+ s, 1 left, about \d+ s; perplexity [\d.e+]+", said)
    assert re.search(r"\[2/2\] done, \d+ s; perplexity [\d.e+]+, [\d.]+% of weights skipped", said), said
    assert re.search(r"1/2 about \d+ s", said), "the time left stands beside the bar"


def test_elsewhere_there_are_plain_lines(
    tiny_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = cells(tiny_folder, text, "method=random", "sparsity=0.4", "probe.names=[quality]")
    dense = found[0].dense_cell()
    assert dense is not None
    run_all([dense, *found], Store(tmp_path), {"name": "none", "group": None}, stderr())
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\r" not in said and "1/2 " not in said
    assert re.search(r"\[1/2\] done, \d+ s, 1 left, about \d+ s; perplexity [\d.e+]+", said)


def test_who_waits_for_processes_sees_what_each_is_at(
    tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells(tiny_folder, text, "method=random", "sparsity=0.4", "probe.names=[quality,sparsity]")
    store = Store(tmp_path)
    with terminal(monkeypatch) as shown, sweeping(3) as bar:
        tally = Tally(3, stderr(), store=store, bar=bar)
        tally.begin(cell)
        with store.claim(cell.id, cell.plain, {}) as claimed:
            claimed.at("sparsity")
            tally.look()
    assert "cells  random 0.4: sparsity, 2 of 2" in shown[0] and "0/3" in shown[0]
    assert "probe" in store.view(cell.id).status


def test_a_bar_inside_of_a_sweep_is_a_line_below_and_nothing_draws_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.progress.PATIENCE_S", 0.0)
    monkeypatch.setattr("harness.progress.PAUSE_S", 0.0)
    with terminal(monkeypatch) as shown, sweeping(2) as bar:
        tell("a cell: [/quality]")
        with counting(4, "windows") as advance:
            advance()
        assert bar.seen and isinstance(bar, Bar) and not bar._progress.live.auto_refresh  # type: ignore[union-attr]
    assert "a cell: [/quality]" in shown[0] and "windows" in shown[0] and "1/4" in shown[0]
