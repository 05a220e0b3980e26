"""The fast version of `python -m tests.chaos`: some kills, and four commands at once on one folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import chaos

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "tests.chaos", "--runs", "local=5,processes=3", "--together"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("engine", "runs"), [("local", 5), ("processes", 3)])
def test_sweeps_that_are_killed_and_started_again_lose_and_repeat_nothing(counts, engine: str, runs: int) -> None:
    found = counts[engine]
    assert found["runs"] == runs and sum(n for what, n in found.items() if what.startswith("killed by")) >= runs // 2
    assert {name: found[name] for name in chaos.BAD} == dict.fromkeys(chaos.BAD, 0)


def test_four_commands_on_one_folder_leave_what_one_leaves(counts) -> None:
    found = counts["together"]
    assert found["ended_well"] >= 1
    assert not any(found.get(name, 0) for name in chaos.BAD)


def test_the_committed_counts_hold_no_loss() -> None:
    held = json.loads((ROOT / "results/bench/chaos.json").read_text())
    assert held["total"]["runs"] == sum(counts["runs"] for counts in held["engines"].values()) > 0
    assert not any(held["total"][name] for name in chaos.BAD)


def test_the_look_sees_what_is_wrong(tmp_path: Path) -> None:
    """The detector itself: a lost cell, a probe of another time, files that are left."""
    from harness.results.collect import collect
    from harness.results.store import Store

    row = {"metric": "acc", "value": 0.5, "n": 10, "unit": "share"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for root, names in ((whole, ("a", "b")), (broken, ("a",))):
        for name in names:
            with Store(root).claim(name, {"model": "m"}, {}) as cell:
                cell.commit("quality", [row | {"value": 0.6} if root == broken else row])
                cell.finish()
        collect(root)
    (broken / "cells/a/lock.json").write_text("{}")
    (broken / "cells/a/.status.json-draft").write_text("")
    kept = {name: at - 1 for name, at in chaos.commits(broken).items()}
    chaos.look(broken, whole, kept, tmp_path / "verdict.json")
    found = json.loads((tmp_path / "verdict.json").read_text())
    assert found == {"lost": 2, "different": 1, "made_twice": 1, "left_files": 2}
    chaos.look(whole, whole, chaos.commits(whole), tmp_path / "verdict.json")
    assert not any(json.loads((tmp_path / "verdict.json").read_text()).values())
