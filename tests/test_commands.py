"""Every command as a user drives it: one habit, and text from outside that is shown as it is."""

from __future__ import annotations

import importlib
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from harness import cli
from harness.figures import draw
from harness.report import html
from harness.results.store import Store
from tests import synthetic

ROOT = Path(__file__).resolve().parents[1]
NASTY = "[/v2] run[final] [bold]x"
READING = ("claims", "figures", "report", "archive", "show any", "diff any other")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with a nasty name."""
    folder = tmp_path_factory.mktemp("commands") / NASTY
    synthetic.fill(Store(folder), methods=("teal",), sparsities=(0.4, 0.5), tasks=("piqa", "arc_easy"))
    return folder


def names(results: Path) -> list[str]:
    return Store(results).cells()


@pytest.mark.parametrize("command", READING)
def test_a_missing_folder_is_one_sentence_that_names_it(command: str, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / NASTY
    arguments = [*command.split(), str(folder)]
    if command == "archive":
        arguments += ["--to", str(tmp_path / "to")]
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert NASTY in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_help_that_says_how_it_is_called(name: str, capsys: Any) -> None:
    if name == "run":  # Hydra's own help
        pytest.skip("tests/test_startup.py")
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: python -m harness {name}")
    if name in {command.split()[0] for command in READING}:
        assert "default: results)" in told
        assert "--results" not in told


def test_the_list_of_commands(capsys: Any) -> None:
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name}" in told for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert cli.main(["shwo"]) == 2
    assert "'shwo' is no command" in capsys.readouterr().err


def test_the_console_command_is_the_same_entry_point() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["dynact"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.script


def drawn_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw, "FIGURES", {"kl": lambda df, limited: plt.figure()})
    monkeypatch.setattr(html, "build", lambda *_: "<html></html>")


@pytest.mark.parametrize("command", ["claims", "figures", "report"])
def test_results_in_a_nasty_folder_are_read(
    command: str, filled: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_quickly(monkeypatch)
    assert cli.main([command, str(filled), "--limited"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert (NASTY in said.out) == (command != "claims")


def test_an_archive_is_shown_as_its_cells_are(filled: Path, tmp_path: Path, capsys: Any) -> None:
    study = tmp_path / NASTY / "study"
    assert cli.main(["archive", str(filled), "--to", str(study)]) == 0
    assert f"{study}: cells 3 done; " in capsys.readouterr().out
    teal = next(name for name in names(filled) if "teal" in name)
    told = []
    for results in (filled, study, study.parent):
        assert cli.main(["show", teal, str(results)]) == 0
        told.append(capsys.readouterr().out)
    # Where it lies and when it ran differ; the archive's order of rows is its own.
    told = [sorted(line.split() for line in one[one.index("config") :].splitlines()) for one in told]
    assert told[0] == told[1] == told[2]


def test_show_tells_status_config_and_rows(filled: Path, capsys: Any) -> None:
    teal = next(name for name in names(filled) if "teal_s0.4" in name)
    assert cli.main(["show", teal[-10:], str(filled)]) == 0, "any part that no other cell has"
    told = capsys.readouterr().out
    assert told.startswith(f"{teal}  done\n")
    lines = [line.split() for line in told.splitlines()]
    assert ["sparsity", "0.4"] in lines
    assert any("token_perplexity" in line for line in lines)
    assert "rows by layer, phase and the like: --all shows them" in told
    assert cli.main(["show", str(filled / "cells" / teal), str(filled), "--all"]) == 0
    whole = capsys.readouterr().out
    assert "--all shows them" not in whole
    assert len(whole.splitlines()) > len(told.splitlines())


def test_show_asks_which_where_several_are_meant(filled: Path, capsys: Any) -> None:
    assert cli.main(["show", "teal", str(filled)]) == 2
    assert "teal is a part of 2 cells: " in capsys.readouterr().err
    assert cli.main(["show", "smollm2-135m_tael_s0.4", str(filled)]) == 2
    assert "did you mean smollm2-135m_teal_s0.4" in capsys.readouterr().err


def test_show_tells_why_a_cell_failed(tmp_path: Path, capsys: Any) -> None:
    store = Store(tmp_path / "results")
    config, identity, _ = next(synthetic.cells())
    with pytest.raises(RuntimeError), store.claim("broken", config, {}, identity):
        raise RuntimeError(f"no luck with {NASTY}")
    assert cli.main(["show", "broken", str(store.root)]) == 0
    told = capsys.readouterr().out
    assert "broken  failed" in told
    assert told.count(f"RuntimeError: no luck with {NASTY}") >= 1
    assert "Traceback" in told


def test_diff_tells_what_differs_and_nothing_else(filled: Path, capsys: Any) -> None:
    dense, low, high = (next(n for n in names(filled) if part in n) for part in ("dense", "s0.4", "s0.5"))
    assert cli.main(["diff", low, high, str(filled)]) == 0
    told = capsys.readouterr().out
    assert "config: 1 keys differ" in told
    lines = [line.split() for line in told.splitlines()]
    assert ["sparsity", "0.4", "0.5"] in lines
    mlp = next(line for line in lines if line[:2] == ["achieved", "mlp"])
    values = [float(cell) for cell in mlp[2:5]]
    assert values[2] == pytest.approx(values[1] - values[0], rel=1e-3)
    assert cli.main(["diff", high, high, str(filled)]) == 0
    told = capsys.readouterr().out
    assert "config: 0 keys differ" in told
    assert "only in" not in told
    assert cli.main(["diff", dense, high, str(filled)]) == 0
    assert "only in B: " in capsys.readouterr().out


RUN: dict[str, Callable[[Path], list[str]]] = {
    "model": lambda folder: ["model=local", f'model.path="{folder}"'],
    "text": lambda folder: [f'calibration.path="{folder}"', "logger=none"],
    "results": lambda folder: [f'results="{folder}/file"', "method=dense", "tasks=none", "probe=sparsity"],
}


@pytest.mark.parametrize("key", RUN)
def test_run_names_what_is_wrong_as_it_was_written(key: str, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / NASTY
    folder.mkdir(parents=True)
    (folder / "file").write_text("not a folder")
    assert cli.main(["run", *RUN[key](folder)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert NASTY in said.err
    assert "Traceback" not in said.err


def test_train_names_what_is_wrong_as_it_was_written(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = importlib.import_module("train")
    folder = tmp_path / NASTY
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["train.py", "train=relu", f'model.path="{folder}"', f'folder="{tmp_path}"'])
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code == 2
    assert f"model.path={folder} holds no config.json" in capsys.readouterr().err


def test_no_command_needs_the_folder_it_was_started_in(filled: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shutil.copytree(filled, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["show", "dense"]) == 0
