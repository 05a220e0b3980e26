"""Files of benchmarks are committed: they name the command, and no path of the machine that it ran on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.record import command, write
from harness.places import RESULTS


def texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for inner in [*tree, *tree.values()] if isinstance(tree, dict) else tree:
            yield from texts(inner)


def test_a_command_is_one_that_anyone_can_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--out", str(tmp_path / "results/a.json"), "--scratch=/else/where", "--threads", "2", "--what", "a b"]
    told = command(["/some/where/bench/cpu_step.py", *words])
    assert told == "python -m bench.cpu_step --out results/a.json --scratch=where --threads 2 --what 'a b'"


def test_a_file_is_written_into_a_new_folder_and_nothing_is_lost_for_its_type(tmp_path: Path) -> None:
    write(tmp_path / "new/a.json", {"a": 1, "b": Path("c")})
    assert json.loads((tmp_path / "new/a.json").read_text()) == {"a": 1, "b": "c"}


@pytest.mark.parametrize("name", sorted(path.name for path in (RESULTS / "bench").glob("*.json")))
def test_committed_files_name_no_path_of_a_machine(name: str) -> None:
    found = json.loads((RESULTS / "bench" / name).read_text())
    words = {word for text in texts(found) for word in re.split(r"[\s\"'=]+", text)}
    assert [word for word in words if len(word) > 1 and Path(word).is_absolute()] == []
