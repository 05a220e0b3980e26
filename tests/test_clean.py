"""The command `clean`: it finds what nobody needs, asks, and leaves alone whatever somebody may need."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from harness import cli
from harness.results.store import Store
from harness.run import clean
from methods.teal import Teal

ROW = {"metric": "acc", "value": 0.5, "n": 10, "unit": "share"}
CONFIG = {"method": {"teal": {"_target_": "methods.teal.Teal", "sparsity": 0.5}}}
VERSIONS = {"method:teal": Teal(0.5).version}
OLD = time.time() - 2 * clean.STALE_S


class Stopped(BaseException):
    """What ends a process that can't say so."""


def cell(store: Store, name: str, error: BaseException | None = None, **versions: Any) -> Path:
    """A cell with one whole probe that has ended, failed or been killed."""
    try:
        with store.claim(name, CONFIG, VERSIONS | versions) as claimed:
            claimed.commit("quality", [ROW])
            if error is not None:
                raise error
            claimed.finish()
    except (Stopped, RuntimeError):
        pass
    return store.view(name).path


def aged(path: Path, content: bytes | None = b"12345") -> Path:
    if content is None:
        path.mkdir(parents=True)
        (path / "rows.parquet").write_bytes(b"123")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.utime(path, (OLD, OLD))
    return path


@pytest.fixture
def littered(tmp_path: Path) -> tuple[Path, dict[str, list[Path]]]:
    """A results folder, and what lies in it by kind."""
    root, store = tmp_path / "results", Store(tmp_path / "results")
    draft = uuid.uuid4().hex
    whole = cell(store, "whole_0123456789")
    by_kind = {
        "failed": [cell(store, "failed", RuntimeError("no luck"))],
        "unfinished": [cell(store, "killed", Stopped())],
        "stale": [cell(store, "old", **{"method:teal": -1})],
        "orphaned": [root / "cells/torn", root / "wandb/offline-run-20260101_000000-gone_abcdef0123"],
        "temporary": [
            aged(whole / f".status.json-{draft}"),
            aged(whole / f"probes/.draft-{draft}", None),
            aged(root / f".table.parquet-{draft}"),
            aged(root / f"fits/.k.safetensors-{draft}"),
            root / "fits/k.layers",
            whole / "lock.json",
        ],
        "kept": [
            whole / "status.json",
            whole / "probes/quality/rows.parquet",
            root / "fits/k.safetensors",
            root / "wandb/offline-run-20260101_000000-whole_0123456789",
            root / "wandb/offline-run-20260101_000000-sweep-01234567",
            tmp_path / "elsewhere/precious",
        ],
    }
    (root / "cells/torn").mkdir()
    (root / "cells/torn/status.json").write_text('{"sta')
    (whole / "lock.json").write_text(json.dumps({"machine": "another", "pid": 1, "process_started": 1.0}))
    os.utime(whole / "lock.json", (OLD, OLD))
    (root / "fits/k.layers").mkdir()
    (root / "fits/k.safetensors").write_bytes(b"whole")
    (root / "fits/j.layers").mkdir()
    by_kind["unfinished"].append(root / "fits/j.layers")
    for path in (by_kind["orphaned"][1], *by_kind["kept"][3:5]):
        path.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/precious").write_text("x")
    (tmp_path / "elsewhere/status.json").write_text('{"status": "failed"}')
    (root / "cells/linked").symlink_to(tmp_path / "elsewhere")
    (root / "cells/failed/linked").symlink_to(tmp_path / "elsewhere")
    return root, by_kind


def test_everything_is_found_with_its_kind_and_size(littered: tuple[Path, dict[str, list[Path]]]) -> None:
    root, by_kind = littered
    found = clean.things(root)
    for kind in ("failed", "unfinished", "stale", "orphaned", "temporary"):
        assert {t.path for t in found if t.kind == kind} == set(by_kind[kind]), kind
    assert {t.kind for t in found} == set(by_kind) - {"kept"}
    sizes = {t.path: t.size for t in found}
    assert sizes[by_kind["temporary"][0]] == 5 and sizes[by_kind["temporary"][1]] == 3
    assert next(t.why for t in found if t.kind == "failed") == "no luck; 1 probes are whole"


@pytest.mark.parametrize(
    ("given", "gone"),
    [
        (["--yes"], ["failed", "orphaned", "temporary"]),
        (["--yes", "--also", "stale"], ["failed", "orphaned", "temporary", "stale"]),
        (
            ["--yes", "--also", "stale", "--also", "unfinished"],
            ["failed", "orphaned", "temporary", "stale", "unfinished"],
        ),
        ([], []),
    ],
)
def test_what_may_be_needed_is_kept_unless_it_is_asked_for(
    littered: tuple[Path, dict[str, list[Path]]], capsys: Any, given: list[str], gone: list[str]
) -> None:
    root, by_kind = littered
    assert cli.main(["clean", str(root), *given]) == 0
    for kind, paths in by_kind.items():
        assert [path.exists() for path in paths] == [kind not in gone] * len(paths), kind
    told = capsys.readouterr().out
    assert "failed" in told and "no luck" in told
    if not given:
        assert "nothing was removed: --yes removes 9 things" in told
    if gone:
        assert not (root / "cells/failed").exists()
        assert {t.kind for t in clean.things(root)} <= {"stale", "unfinished"} - set(gone)


@pytest.mark.parametrize(("answer", "removed"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_it_asks_first(
    littered: tuple[Path, dict[str, list[Path]]], monkeypatch: pytest.MonkeyPatch, answer: str, removed: bool
) -> None:
    root, by_kind = littered

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    assert cli.main(["clean", str(root)]) == 0
    assert by_kind["failed"][0].exists() is not removed


def test_a_finished_cell_goes_only_by_its_whole_name(littered: tuple[Path, dict[str, list[Path]]], capsys: Any) -> None:
    root, _ = littered
    assert cli.main(["clean", str(root), "--yes", "--cell", "whole"]) == 2
    assert "no cell in" in capsys.readouterr().err
    assert (root / "cells/whole_0123456789").exists()
    assert cli.main(["clean", str(root), "--yes", "--cell", "whole_0123456789"]) == 0
    assert not (root / "cells/whole_0123456789").exists()


def test_what_somebody_is_at_work_on_is_not_touched(tmp_path: Path) -> None:
    store = Store(tmp_path)
    cell(store, "c", RuntimeError("before"))
    found = clean.things(tmp_path)
    with store.claim("c", CONFIG, VERSIONS) as claimed:
        draft = aged(claimed.path / f".status.json-{uuid.uuid4().hex}")
        (tmp_path / "fits/k.layers").mkdir(parents=True)
        with FileLock(tmp_path / "fits/k.lock"):
            assert clean.things(tmp_path) == []
        with pytest.raises(clean.LockedError):
            clean.remove(found[0])  # it was listed before the process came
        assert draft.exists() and claimed.probes() == ["quality"]
        claimed.finish()


def test_a_folder_of_somebody_elses_makes_nothing_be_imported(tmp_path: Path) -> None:
    store = Store(tmp_path)
    mine: Callable[[str], dict[str, Any]] = lambda target: {"method": {"x": {"_target_": target}}}  # noqa: E731
    for name, target in (("a", "antigravity.x"), ("b", "os.system"), ("c", "methods.teal.annotations"), ("d", "x")):
        with store.claim(name, mine(target), {}) as claimed:
            claimed.finish()
    assert clean.things(tmp_path) == []
    assert "antigravity" not in sys.modules


def test_a_clean_folder_and_none_are_one_sentence(tmp_path: Path, capsys: Any) -> None:
    cell(Store(tmp_path), "c")
    assert cli.main(["clean", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"nothing to clean in {tmp_path}\n"
    assert cli.main(["clean", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
