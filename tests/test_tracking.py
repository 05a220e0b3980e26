"""What W&B was told about a cell, read back from the offline run file by wandb's own reader."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from harness.errors import UnsupportedError
from harness.places import CONF
from harness.report.tracking import (
    AGENTS,
    NullTracker,
    follow,
    headline_numbers,
    logged_in,
    tell_again,
    track,
    track_sweep,
)
from harness.results.collect import headline, read_rows
from harness.results.rows import COLUMNS
from harness.results.store import Store
from harness.run import plan
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
        raise ZeroDivisionError("by\nnothing")
    run = read_back(tmp_path)
    assert (run["exit_code"], run["state"]) == (1, "failed")
    assert (run["summary"]["status"], run["summary"]["message"]) == ("failed", "by nothing")


@pytest.mark.parametrize(
    ("error", "status"), [(MemoryError("no room"), "oom"), (UnsupportedError("no gate"), "unsupported")]
)
def test_a_cell_without_results_says_how_it_ended(tmp_path: Path, error: Exception, status: str) -> None:
    with pytest.raises(type(error)), track("c", CONFIG, root=tmp_path):
        raise error
    assert read_back(tmp_path)["summary"]["status"] == status
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert status.encode() in file.read_bytes(), "a tag, which wandb's own reader does not print"


def test_a_sweep_has_a_run_of_its_own_with_its_table_its_failures_and_its_figures(tmp_path: Path) -> None:
    table = synthetic.table(methods=("teal", "cats"), sparsities=(0.3, 0.5))
    names = list(table["cell_id"].unique())
    outcomes = dict.fromkeys(names, ("done", "")) | {names[1]: ("failed", "no luck"), "gone": ("oom", "no room")}
    track_sweep("sweep-1", table, outcomes, root=tmp_path, logger="wandb")
    run = read_back(tmp_path)
    assert (run["run_id"], run["exit_code"], run["state"]) == ("sweep-1", 1, "failed")
    summary = run["summary"]
    told = {key: summary[key] for key in ("cells_asked", "cells_done", "cells_failed", "cells_oom")}
    assert told == {"cells_asked": len(outcomes), "cells_done": len(names) - 1, "cells_failed": 1, "cells_oom": 1}
    assert summary["message"] == f"2 of {len(outcomes)} cells failed: {names[1]}, gone"
    stored = {}
    for name in ("cells", "comparison"):
        (media,) = tmp_path.glob(f"wandb/offline-run-*/files/{summary[name]['path']}")
        stored[name] = json.loads(media.read_text())
    assert [names[1], "failed", "no luck"] in stored["cells"]["data"]
    lines = headline(table)
    comparison = pd.DataFrame(stored["comparison"]["data"], columns=stored["comparison"]["columns"])
    assert comparison["cell_id"].tolist() == lines["cell_id"].tolist()
    assert comparison["perplexity"].tolist() == pytest.approx(lines["perplexity"].tolist())
    images = [path.read_bytes()[:8] for path in tmp_path.glob("wandb/offline-run-*/files/media/images/figures/*.png")]
    assert len(images) >= 3 and set(images) == {b"\x89PNG\r\n\x1a\n"}


def test_under_an_agent_the_cell_that_was_asked_for_is_the_agents_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "agents")
    monkeypatch.setenv(AGENTS, "")  # so that it is put back
    monkeypatch.delenv(AGENTS)
    assert not follow(["teal_1", "teal_2"], "wandb") and not follow(["teal_1"], "none")
    assert follow(["teal_1"], "wandb")
    with track("dense_1", CONFIG, root=tmp_path) as tracker:
        tracker.log(one_cell())
    track_sweep("sweep-1", one_cell(), {"teal_1": ("done", "")}, root=tmp_path, logger="wandb")
    assert not list(tmp_path.glob("wandb/*run-*"))
    store = Store(tmp_path)
    synthetic.fill(store, methods=("teal",), sparsities=(0.4,))
    name = next(name for name in store.cells() if "teal" in name)
    follow([name], "wandb")
    tell_again(store.view(name), root=tmp_path, logger="wandb")  # it had finished before
    run = read_back(tmp_path)
    assert (run["run_id"], run["exit_code"]) == ("agents", 0)
    assert run["summary"]["rows"]["nrows"] == len(read_rows(store)[0].query(f"cell_id == '{name}'"))


def test_the_yaml_for_wandb_sweep_drives_run_py() -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load((CONF / "sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).is_file() and sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"]["name"] in headline_numbers(one_cell())
    assert sweep["command"] == ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
    axes = {key: given.get("values", [given.get("value")]) for key, given in sweep["parameters"].items()}
    found = set()
    for values in itertools.product(*axes.values()):
        drawn = {key: {"value": value} for key, value in zip(axes, values, strict=True)}
        arguments = create_sweep_command_args({"args": drawn})["args_no_hyphens"]
        (cell,) = plan.read(arguments, multirun=False).cells
        found.add(cell.id)
    assert len(found) == len(sweep["parameters"]["method"]["values"]) * len(sweep["parameters"]["sparsity"]["values"])


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
