"""run.py in a process of its own, as tests drive it: on a tiny model, in folders of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from harness.results.collect import read_table
from harness.results.store import Store
from tests.forks import ROOT, Forks, Process

SMALL = (
    "probe=quick tasks=[piqa] tasks.limit=4 calibration.tokens=256 calibration.window=64 dtype=float32 device=cpu "
    "probe.perplexity.window=64 probe.latency.min_seconds=0.1 probe.latency.context=[16]"
).split()
PATIENCE = 600  # seconds; a run takes some ten


class Runner:
    """Runs run.py on a tiny model, in a working folder of its own. forks: what its processes are forked from."""

    def __init__(self, model: Path, folder: Path, forks: Forks | None = None) -> None:
        self.folder, self.forks = folder, forks
        self.results = folder / "results"
        text = model / "text.txt"  # beside the model, so that runs in different folders are about the same cells
        if not text.exists():
            text.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(300)))
        texts = [f"calibration.path={text}", f"probe.perplexity.path={text}"]
        self.always = ["model=local", f"model.path={model}", *SMALL, *texts, f"results={self.results}"]
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "HYDRA_FULL_ERROR"}
        self.env |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "NETRC": str(folder / "no-netrc")}
        (folder / "cwd").mkdir()

    def start(
        self, *overrides: str, before: str | None = None, logger: str = "none", fresh: bool = False
    ) -> subprocess.Popen[str] | Process:
        """Start run.py; `before` is Python that runs in its process first.

        fresh: start Python anew, and so do workers, as users have it. Without `forks` every process is fresh.
        """
        command = [str(ROOT / "run.py"), *self.always, f"logger={logger}", *overrides]
        if self.forks is not None and not fresh:
            return self.forks.start(command, self.folder / "cwd", self.env, before)
        assert before is None
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder / "cwd",
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A suite in a shell's background inherits an ignored SIGINT, and so would the run that is interrupted.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *overrides: str, code: int = 0, **how: Any) -> tuple[str, str]:
        """Run it to the end; returns (stdout, stderr). No run may leave anything in the working folder."""
        process = self.start(*overrides, **how)
        out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        assert list((self.folder / "cwd").iterdir()) == []
        return out, err

    @property
    def store(self) -> Store:
        return Store(self.results)

    def table(self) -> pd.DataFrame:
        return read_table(self.results / "table.parquet")

    def commits(self) -> dict[str, int]:
        """Probe -> when it was committed: equal times mean that it was not run again."""
        views = [self.store.view(cell) for cell in self.store.cells()]
        rows = [view.path / "probes" / probe / "rows.parquet" for view in views for probe in view.probes()]
        return {str(path.parent.relative_to(self.results)): path.stat().st_mtime_ns for path in rows}

    def interrupt(self, when: Callable[[], bool], with_signal: signal.Signals, *overrides: str) -> int:
        """Start a run, send a signal as soon as `when()`, return the exit code."""
        process = self.start(*overrides)
        deadline = time.monotonic() + PATIENCE
        while not when():
            assert process.poll() is None and time.monotonic() < deadline, "".join(process.communicate())
            time.sleep(0.02)
        process.send_signal(with_signal)
        process.communicate(timeout=PATIENCE)
        return process.returncode


def measured(table: pd.DataFrame) -> pd.DataFrame:
    """What must not differ between two runs of one command: every row but those of time."""
    rows = table[table["probe"] != "latency"]
    order = ["cell_id", "probe", "task", "metric", "layer", "site", "step_phase"]
    return rows.sort_values(order).reset_index(drop=True)
