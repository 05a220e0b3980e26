"""What W&B was told about a cell, read back from the offline run file by wandb's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.report.tracking import NullTracker, headline_numbers, logged_in, track
from harness.results.rows import COLUMNS
from tests import synthetic

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"model": {"name": "smollm2-135m"}, "method": {"name": "teal"}, "sparsity": 0.4, "tasks": ["piqa"]}


@pytest.fixture(autouse=True)
def nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))


def one_cell() -> pd.DataFrame:
    table = synthetic.table(methods=("teal",), sparsities=(0.4,))
    return table[table["method"] == "teal"].reset_index(drop=True)


def read_back(root: Path) -> dict[str, Any]:
    (file,) = root.glob("wandb/offline-run-*/run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(file)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def test_the_offline_run_file_holds_config_headline_and_rows(tmp_path: Path, capfd) -> None:
    rows = one_cell()
    with track("teal_abc", CONFIG, root=tmp_path, group="sweep-1") as tracker:
        tracker.log(rows)
    assert capfd.readouterr() == ("", "")
    run = read_back(tmp_path)
    assert (run["run_id"], run["exit_code"], run["project"]) == ("teal_abc", 0, "dynact")
    assert run["config"] == CONFIG
    numbers = headline_numbers(rows)
    assert {"perplexity", "kl", "flips", "achieved_model", "tpot_ms", "acc:piqa", "execution"} <= set(numbers)
    assert {name: run["summary"][name] for name in numbers} == pytest.approx(numbers)
    assert "speedup" not in run["summary"]
    table = run["summary"]["rows"]
    assert (table["nrows"], table["ncols"]) == (len(rows), rows.shape[1])
    (media,) = tmp_path.glob(f"wandb/offline-run-*/files/{table['path']}")
    stored = json.loads(media.read_text())
    assert stored["columns"] == list(rows.columns)
    values = [row[stored["columns"].index("value")] for row in stored["data"]]
    assert values == pytest.approx(rows["value"].tolist())


def test_a_failing_cell_closes_its_run_with_an_exit_code(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), track("c", CONFIG, root=tmp_path):
        raise ZeroDivisionError
    assert (read_back(tmp_path)["exit_code"], read_back(tmp_path)["state"]) == (1, "failed")


def test_rows_that_were_not_collected_have_a_headline_too() -> None:
    rows = one_cell()
    plain = headline_numbers(rows[list(COLUMNS)])
    assert plain["perplexity"] == headline_numbers(rows)["perplexity"]
    assert all(isinstance(value, float | int | str) for value in plain.values())
    assert headline_numbers(rows.head(0)) == {}


def test_online_without_a_login_goes_offline_and_does_not_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with track("c", CONFIG, root=tmp_path):
        pass
    assert read_back(tmp_path)["exit_code"] == 0


def test_wandb_mode_disabled_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with track("c", CONFIG, root=tmp_path) as tracker:
        tracker.log(one_cell())
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_trouble_with_wandb_is_a_warning_and_not_a_failed_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(wandb, "init", broken)
    with pytest.warns(UserWarning, match="no room"), track("c", CONFIG, root=tmp_path) as tracker:
        tracker.log(one_cell())
    assert isinstance(tracker, NullTracker)


def test_logger_none_neither_writes_nor_imports_wandb(tmp_path: Path) -> None:
    program = (
        "import sys; from harness.report.tracking import track\n"
        f"with track('c', {{}}, root={str(tmp_path)!r}, logger='none') as tracker: tracker.log(None)\n"
        "assert 'wandb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    assert list(tmp_path.iterdir()) == []


def test_credentials_are_found_where_wandb_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not logged_in("https://api.wandb.ai")
    (tmp_path / "no-netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert logged_in("https://api.wandb.ai") and not logged_in("https://wandb.example.org")
    (tmp_path / "no-netrc").write_text("machine machine machine\n")
    assert not logged_in("https://api.wandb.ai")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert logged_in("https://api.wandb.ai")
