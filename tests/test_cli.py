"""run.py as a user drives it: sweeps, failures, interruptions, side by side. Every run is a process of its own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pandas.testing import assert_frame_equal

from harness.report import archive
from harness.results.cells import CellView
from tests.forks import Forks
from tests.runner import Runner, measured

SWEEP = ["-m", "method=teal,random", "sparsity=0.4,0.5"]


@pytest.fixture(scope="module")
def sweep(tiny_folder: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A two-by-two sweep, finished, with W&B as users have it by default."""
    runner = Runner(tiny_folder, tmp_path_factory.mktemp("sweep"), forks)
    runner.out, runner.err = runner.run(*SWEEP, logger="wandb", fresh=True)
    return runner


def test_a_sweep_joins_quality_sparsity_and_latency_in_one_table(sweep: Runner) -> None:
    table = sweep.table()
    cells = table.drop_duplicates("cell_id").set_index(["method", "sparsity_requested"])
    assert sorted(cells.index) == [("dense", 0.0), *((m, s) for m in ("random", "teal") for s in (0.4, 0.5))]
    assert set(table["status"]) == {"ok"}
    assert table[["value", "unit", "n", "source"]].notna().all(axis=None)
    for cell, rows in table.groupby("cell_id"):
        assert set(rows["probe"]) == {"quality", "sparsity", "latency"}, cell
        smoke = rows.groupby("probe")["limited"].agg(["all", "any"])
        assert smoke.loc[["quality", "sparsity"], "all"].all(), "four documents a task, little text: a smoke run"
        assert not smoke.loc["latency", "any"], "three rounds are timed"
    achieved = table[(table["metric"] == "achieved") & (table["site"] == "model") & (table["step_phase"] == "all")]
    achieved = achieved[(achieved["probe"] == "sparsity") & achieved["task"].isna()]
    for row in achieved.itertuples():
        assert row.value == pytest.approx(row.sparsity_requested, abs=0.05)
    kl = table[table["metric"] == "kl_to_dense"].set_index(["method", "sparsity_requested"])["value"]
    assert set(kl.index) == {(m, s) for m in ("random", "teal") for s in (0.4, 0.5)} and (kl > 0).all()
    assert table.loc[table["metric"] == "token_perplexity", "dense_value"].nunique() == 1
    assert (sweep.results / "table.csv").exists()


def test_a_sweep_prints_its_plan_its_table_and_where_the_rows_lie(sweep: Runner) -> None:
    assert sweep.err.count("  run\n") == 5 and "5 of 5 cells have results" in sweep.err
    for word in ("requested", "achieved", "perplexity", "piqa", "LIMITED RUN", "teal", "random", "dense"):
        assert word in sweep.out
    assert "…" not in sweep.out, "nothing may be cut off where the output is a file"
    assert str(sweep.results / "table.parquet") in sweep.err.replace("\n", "")
    assert "Traceback" not in sweep.err and "fatal" not in sweep.err


def test_one_fit_serves_every_sparsity_of_a_sweep(sweep: Runner) -> None:
    assert len(sweep.store.fits.made()) == 1  # teal's; random learns nothing


def test_wandb_has_every_cell_of_the_sweep(sweep: Runner) -> None:
    files = {path.stem.removeprefix("run-"): path for path in sweep.results.glob("wandb/offline-run-*/run-*.wandb")}
    (whole,) = files.keys() - set(sweep.store.cells())
    assert sorted(files.keys() - {whole}) == sweep.store.cells()
    table = sweep.table()
    name = next(cell for cell in files if "_teal_s0.4_" in cell)
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(files[name])]
    run = json.loads(subprocess.run(inspect, capture_output=True, check=True, text=True).stdout)
    assert (run["run_id"], run["exit_code"], run["state"]) == (name, 0, "finished")
    assert run["config"] == sweep.store.view(name).config
    rows = table[table["cell_id"] == name]
    assert run["summary"]["rows"]["nrows"] == len(rows)
    perplexity = rows.loc[rows["metric"] == "token_perplexity", "value"].item()
    assert run["summary"]["perplexity"] == pytest.approx(perplexity)
    groups = {re.search(rb"sweep-[0-9a-f]{8}", path.read_bytes())[0] for path in files.values()}
    assert groups == {whole.encode()}, "one group a sweep; wandb's own reader does not print it"
    told = json.loads(subprocess.run([*inspect[:-1], str(files[whole])], capture_output=True, check=True).stdout)
    assert (told["exit_code"], told["summary"]["cells_done"]) == (0, len(sweep.store.cells()))
    assert told["summary"]["comparison"]["nrows"] == len(sweep.store.cells())


def test_the_same_sweep_again_only_skips(sweep: Runner) -> None:
    before, table = sweep.commits(), sweep.table()
    _, err = sweep.run(*SWEEP, before="pass")
    assert err.count("skip: finished") == 5
    assert err.splitlines()[-1] == "model code imported: False"
    assert sweep.commits() == before
    assert_frame_equal(sweep.table(), table)


def test_dry_says_what_would_run_and_writes_nothing(runner: Runner) -> None:
    out, err = runner.run(*SWEEP, "dry=true", before="pass")
    assert err.count("  run\n") == 5 and out == ""
    assert err.splitlines()[-1] == "model code imported: False"
    assert runner.store.cells() == []


def test_a_plan_says_about_how_long_it_will_take(sweep: Runner) -> None:
    out, err = sweep.run("-m", "method=teal,cats", "sparsity=0.3,0.4", "plan=true", before="pass")
    plan = {line.split()[0].rsplit("_", 1)[0]: line for line in err.splitlines() if "_s0" in line}
    model = sweep.always[1].rpartition("/")[2]
    assert "skip: finished" in plan[f"{model}_teal_s0.4"] and "about" not in plan[f"{model}_teal_s0.4"]
    assert re.search(r"run, about \d+ (s|min)$", plan[f"{model}_teal_s0.3"])
    assert re.search(r"run, about \d+ (s|min)$", plan[f"{model}_cats_s0.3"]), "as long as other methods took"
    assert re.search(r"3 cells to run, about \d+ (s|min) one after the other$", err.splitlines()[-2])
    assert out == "" and err.splitlines()[-1] == "model code imported: False"


@pytest.fixture(scope="module")
def resumed(tiny_folder: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The same sweep in another folder: stopped by Ctrl-C in its first cell, killed in a later one, then finished."""
    runner = Runner(tiny_folder, tmp_path_factory.mktemp("resumed"), forks)
    runner.stopped = runner.interrupt(lambda: len(runner.commits()) >= 1, signal.SIGINT, *SWEEP)
    runner.after_stop = [state(runner.store.view(cell)) for cell in runner.store.cells()]
    runner.interrupt(lambda: len(runner.commits()) >= 6, signal.SIGKILL, *SWEEP)
    runner.kept = runner.commits()
    runner.out, runner.err = runner.run(*SWEEP)
    return runner


def state(cell: CellView) -> dict[str, Any]:
    """What an interruption may not break."""
    return {
        "status": cell.status["status"],
        "locked": (cell.path / "lock.json").exists(),
        "rows": sum(len(cell.read(probe)) for probe in cell.probes()),
        "drafts": [path.name for path in (cell.path / "probes").glob(".*")],
    }


def test_ctrl_c_ends_with_130_and_leaves_whole_probes(resumed: Runner) -> None:
    assert resumed.stopped == 130
    (cell,) = resumed.after_stop
    assert cell["status"] == "running" and not cell["locked"] and cell["rows"] > 0 and cell["drafts"] == []


def test_a_killed_sweep_goes_on_without_repeating_what_was_finished(resumed: Runner) -> None:
    assert 6 <= len(resumed.kept) < len(resumed.commits())
    assert resumed.kept.items() <= resumed.commits().items()
    assert "skip: finished" in resumed.err and "5 of 5 cells have results" in resumed.err
    assert len(resumed.store.fits.made()) == 1


def test_a_killed_sweep_ends_in_the_table_of_an_uninterrupted_one_bit_for_bit(sweep: Runner, resumed: Runner) -> None:
    expected, got = measured(sweep.table()), measured(resumed.table())
    assert len(expected) > 100
    assert_frame_equal(got, expected, check_exact=True)


def test_one_failing_cell_does_not_stop_a_sweep(runner: Runner) -> None:
    breaks = (
        "from transformers.modeling_utils import PreTrainedModel as P; load = P.from_pretrained.__func__\n"
        "def counted(cls, *a, **k):\n    print('LOADED', file=sys.stderr)\n    return load(cls, *a, **k)\n"
        "P.from_pretrained = classmethod(counted)\n"
        "from methods.random import Random\n"
        "def select(self, *a):\n    raise ZeroDivisionError('broken on purpose')\n"
        "Random.select = select"
    )
    command = ["-m", "method=random,teal", "sparsity=0.4", "probe.names=[quality]", "tasks=none"]
    out, err = runner.run(*command, code=1, before=breaks)
    failed, *others = sorted(runner.store.cells(), key=lambda cell: "_random_" not in cell)
    assert runner.store.view(failed).status["status"] == "failed"
    assert "ZeroDivisionError" in (runner.store.view(failed).path / "error.txt").read_text()
    assert [runner.store.view(cell).status["status"] for cell in others] == ["done", "done"]
    assert "2 of 3 cells have results" in err and f"{failed}: failed: broken on purpose" in err
    assert "teal" in out and "random" in out
    assert "Traceback" not in err
    assert err.count("LOADED") == 1, "a sweep loads its model once"

    _, err = runner.run(*command, code=1)  # a failed cell is not run again, and not forgotten
    assert "failed before" in err and "broken on purpose" in err


def test_a_counted_level_skips_what_was_asked_for_and_is_counted_once(runner: Runner) -> None:
    """On the text that it was counted on. Quality and speed are two cells, and the second one reads the level."""
    texts = ["calibration.seed=null", "probe.sparsity.windows=4", "tasks=none", "scope=achieved", "sparsity=0.4"]
    says = (
        "from harness.run import scope; count = scope.counted\n"
        "def counted(*a):\n    print('COUNTED', file=sys.stderr)\n    return count(*a)\n"
        "scope.counted = counted"
    )
    asked = ["-m", "method=teal,chess,[spon,teal]", "method.spon.epochs=1", *texts]
    _, first = runner.run(*asked, "probe.names=[quality,sparsity]", before=says)
    _, again = runner.run(*asked, "probe.names=[sparsity,latency]", before=says)
    assert first.count("COUNTED") > 3 and "COUNTED" not in again, "arithmetic is not near enough for all three"
    table = runner.table()
    counted = table[(table["metric"] == "achieved") & (table["site"] == "model") & (table["step_phase"] == "all")]
    counted = counted[counted["task"].isna() & (counted["method"] != "dense")]
    assert sorted(counted["method"]) == sorted(2 * ["chess", "spon+teal", "teal"]) and set(counted["scope"]) == {
        "achieved"
    }
    assert (counted["value"] - 0.4).abs().max() < 0.002 + 1e-9, "thresholds move in steps of single channels of a token"
    assert set(counted["needs"]) <= {"calibration", "training"} and counted["calibration"].notna().all()


UNSUPPORTED = {
    "cats": "has none",  # no gate
    "cett": "scope=model has nothing to solve for",
    "moefication": "experts of 24 neurons do not divide the 128 neurons",
    "dejavu": "cannot look 3 blocks ahead in the 3 blocks",
}


def test_an_unsupported_pair_is_a_status_and_no_failure(tmp_path: Path, tokenizer: Any, forks: Forks) -> None:
    from tests.tiny import save_with_tokenizer

    runner = Runner(save_with_tokenizer(tmp_path / "opt", tokenizer, family="opt"), tmp_path, forks)
    options = ["cett.cett=0.2", "moefication.expert_size=24", "dejavu.predictor=lookahead", "dejavu.lookahead=3"]
    sweep = ["-m", f"method={','.join(UNSUPPORTED)}", *(f"method.{option}" for option in options), "scope=model"]
    _, err = runner.run(*sweep, "probe.names=[sparsity]", "tasks=none")
    statuses = {cell.split("_")[1]: runner.store.view(cell).status for cell in runner.store.cells()}
    assert {status["status"] for status in statuses.values()} == {"unsupported"}
    assert all(sentence in statuses[method]["message"] for method, sentence in UNSUPPORTED.items())
    assert "unsupported" in err and "Traceback" not in err


# ------------------------------------------------------------------------------------------ side by side


@pytest.fixture(scope="module")
def beside(tiny_folder: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The same sweep by three processes: stopped by Ctrl-C as soon as something is committed, then finished by two."""
    runner = Runner(tiny_folder, tmp_path_factory.mktemp("beside"), forks)
    runner.env["OMP_NUM_THREADS"] = "1"
    runner.stopped = runner.interrupt(lambda: len(runner.commits()) >= 1, signal.SIGINT, *SWEEP, "workers=3")
    runner.after_stop = [state(runner.store.view(cell)) for cell in runner.store.cells()]
    runner.kept = runner.commits()
    runner.out, runner.err = runner.run(*SWEEP, "workers=2", fresh=True)
    return runner


def test_ctrl_c_stops_every_worker_and_nothing_is_lost(beside: Runner) -> None:
    assert beside.stopped == 130
    assert not any(cell["locked"] or cell["drafts"] for cell in beside.after_stop)
    assert beside.kept and beside.kept.items() <= beside.commits().items()


def test_workers_leave_what_one_process_leaves(sweep: Runner, beside: Runner) -> None:
    assert "5 of 5 cells have results" in beside.err and "[1/" in beside.err
    assert_frame_equal(measured(sweep.table()), measured(beside.table()))
    assert len(beside.store.fits.made()) == 1, "who wants a fit that another makes waits for it"


def test_a_cell_without_results_does_not_stop_the_others_side_by_side(runner: Runner) -> None:
    _, err = runner.run("-m", "method=teal,moefication", "sparsity=0.5", "method.moefication.expert_size=7",
                        "tasks.names=[]", "workers=2")  # fmt: skip
    assert "2 of 3 cells have results" in err and "experts of 7 neurons do not divide" in err


@pytest.mark.parametrize(
    ("how", "words", "workers"),
    [("Killed", "ended by SIGKILL", 2), ("Exits", "called exit(3)", 2), ("Exits", "called exit(3)", 1)],
)
def test_a_cell_that_takes_its_process_with_it_takes_no_other_cell(
    runner: Runner, how: str, words: str, workers: int
) -> None:
    command = ["-m", "method=random", "sparsity=0.5,0.4", f"method.random._target_=tests.dying.{how}"]
    _, err = runner.run(*command, "probe=sparsity", "tasks=none", f"workers={workers}", code=1)
    ended = {name.split("_")[-2]: runner.store.view(name).status for name in runner.store.cells()}
    assert ended["s0.4"]["status"] == "done"
    assert ended["s0.5"]["status"] == "failed" and words in ended["s0.5"]["message"]
    assert "1 of 2 cells have results" in err and words in err


@pytest.mark.parametrize("workers", [1, 2])
def test_cells_of_an_archive_are_not_run_again(sweep: Runner, runner: Runner, workers: int) -> None:
    study = runner.folder / "study"
    half = runner.folder / "half" / "cells"
    half.mkdir(parents=True)
    for name in sweep.store.cells():
        if "teal" in name:
            (half / name).symlink_to(sweep.results / "cells" / name)
    archive.write([half.parent], study)
    _, err = runner.run(*SWEEP, f"archived={study}", f"workers={workers}")
    assert f"2 cells are in {study} already" in " ".join(err.split())
    assert sorted(name.split("_")[1] for name in runner.store.cells()) == ["dense", "random", "random"]
