"""run.py as a user drives it: bad input, sweeps, failures, interruptions. Every run is a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from harness.report import archive
from harness.results.cells import CellView
from harness.results.collect import read_table
from harness.results.store import Store

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "probe=quick tasks=[piqa] tasks.limit=4 calibration.tokens=256 calibration.window=64 dtype=float32 device=cpu "
    "probe.perplexity.window=64 probe.latency.min_seconds=0.1 probe.latency.context=[16]"
).split()
SWEEP = ["-m", "method=teal,random", "sparsity=0.4,0.5"]
PATIENCE = 300  # seconds; a run takes some ten

# run.py after some lines of a test's own. At the end it says whether the code of a model was ever imported.
DRIVER = f"""
import atexit, runpy, sys
sys.argv[0] = {str(ROOT / "run.py")!r}
sys.path.insert(0, {str(ROOT)!r})
model = "transformers.models.llama.modeling_llama"
atexit.register(lambda: print("model code imported:", model in sys.modules, file=sys.stderr))
%s
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Runner:
    """Runs run.py on a tiny model, in a working folder of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder
        self.results = folder / "results"
        text = model / "text.txt"  # beside the model, so that runs in different folders are about the same cells
        if not text.exists():
            text.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(300)))
        texts = [f"calibration.path={text}", f"probe.perplexity.path={text}"]
        self.always = ["model=local", f"model.path={model}", *SMALL, *texts, f"results={self.results}"]
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "HYDRA_FULL_ERROR"}
        self.env |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "NETRC": str(folder / "no-netrc")}
        (folder / "cwd").mkdir()

    def start(self, *overrides: str, before: str | None = None, logger: str = "none") -> subprocess.Popen[str]:
        """Start run.py; `before` is Python that runs in its process first."""
        program = [str(ROOT / "run.py")] if before is None else ["-c", DRIVER % before]
        return subprocess.Popen(
            [sys.executable, *program, *self.always, f"logger={logger}", *overrides],
            cwd=self.folder / "cwd",
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A suite in a shell's background inherits an ignored SIGINT, and so would the run that is interrupted.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *overrides: str, code: int = 0, before: str | None = None, logger: str = "none") -> tuple[str, str]:
        """Run it to the end; returns (stdout, stderr). No run may leave anything in the working folder."""
        process = self.start(*overrides, before=before, logger=logger)
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


@pytest.fixture
def runner(tiny_folder: Path, tmp_path: Path) -> Runner:
    return Runner(tiny_folder, tmp_path)


@pytest.fixture(scope="module")
def sweep(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A two-by-two sweep, finished, with W&B as users have it by default."""
    runner = Runner(tiny_folder, tmp_path_factory.mktemp("sweep"))
    runner.out, runner.err = runner.run(*SWEEP, logger="wandb")
    return runner


# ------------------------------------------------------------------------------------------ bad input

BAD = {
    "sparsity-high": (["sparsity=1.5"], "sparsity is a share: it must be at least 0 and below 1, not 1.5"),
    "sparsity-low": (["sparsity=-0.1"], "sparsity is a share"),
    "sparsity-word": (["sparsity=abc"], "sparsity must be a number, not 'abc'"),
    "method": (["method=teel"], "did you mean teal?"),
    "method-in-sweep": (["-m", "method=random,teel"], "did you mean teal?"),
    "method-option": (["method.teal.alocation=greedy"], "method.teal.alocation"),
    "task": (["tasks=[piqq]"], "unknown task piqq: did you mean piqa?"),
    "model-path": (["model.path=/no/such/folder"], "model.path names a folder that does not exist"),
    "hub": (["model=mistral-7b", "model.path=null"], "HF_HUB_OFFLINE is set"),
    "calibration": (["calibration.tokens=100000000"], "calibration asks for 100000000 tokens but the text has only"),
    "perplexity": (["probe.perplexity.windows=1000000"], "perplexity asks for"),
    "key": (["sparsty=0.4"], "sparsty"),
    "workers": (["workers=0"], "workers must be a whole number of at least 1, not 0"),
    "workers-and-launcher": (["workers=2", "hydra/launcher=basic"], "give either them or hydra/launcher"),
    "on-error": (["on_error=halt"], "on_error must be one of go_on, stop"),
    "switch": (["force=yes please"], "force must be true or false, not 'yes please'"),
    "archived": (["archived=/no/such/study"], "archived names a folder without an archived study: /no/such/study"),
    "no-value": (["sparsity"], "'sparsity' is not an override: write key=value"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_sentence_before_a_model_loads(runner: Runner, name: str) -> None:
    overrides, sentence = BAD[name]
    out, err = runner.run(*overrides, code=2, before="pass")
    error, probe = err.splitlines()
    assert error.startswith("error: ") and sentence in error
    assert probe == "model code imported: False"
    assert out == ""
    assert runner.store.cells() == [] and not list(runner.results.glob("*"))


def test_results_that_can_not_be_written_end_before_a_model_loads(runner: Runner) -> None:
    (runner.folder / "file").write_text("")
    _, err = runner.run(f"results={runner.folder}/file/results", code=2, before="pass")
    assert err.splitlines()[0].startswith("error: results can't be stored in")
    assert err.splitlines()[1:] == ["model code imported: False"]


FULL = "import errno, os\ndef full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"


def test_a_disk_that_is_full_ends_before_a_model_loads(runner: Runner) -> None:
    _, err = runner.run(code=2, before=FULL + "import tempfile; tempfile.TemporaryFile = full")
    assert err.splitlines() == [
        f"error: results can't be stored in {runner.results}: the disk is full",
        "model code imported: False",
    ]
    assert runner.store.cells() == []


def test_a_disk_that_fills_up_leaves_whole_probes_and_the_run_can_go_on(runner: Runner) -> None:
    fills = FULL + (
        "import pandas as pd; write = pd.DataFrame.to_parquet\n"
        "def once(self, path, **k):\n"
        "    if 'probes' in str(path) and 'sparsity' in set(self.get('probe', ())): full()\n"
        "    return write(self, path, **k)\n"
        "pd.DataFrame.to_parquet = once"
    )
    _, err = runner.run("method=dense", code=2, before=fills)
    assert err.splitlines()[-2].startswith("error: results can't be stored in")
    assert "the disk is full" in err and "Traceback" not in err
    kept = runner.commits()
    assert {Path(name).name for name in kept} == {"perplexity", "quality-piqa"}
    runner.run("method=dense")
    assert kept.items() <= runner.commits().items()
    assert all(runner.store.view(cell).status["status"] == "done" for cell in runner.store.cells())


def test_a_model_that_can_not_be_read_is_one_sentence_and_mended_by_the_same_command(
    tmp_path: Path, tokenizer: Any
) -> None:
    from tests.tiny import save_with_tokenizer

    runner = Runner(save_with_tokenizer(tmp_path / "model", tokenizer), tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    command = ["method=dense", "probe.names=[sparsity]", "tasks=none"]
    _, err = runner.run(*command, code=2)
    assert err.splitlines()[-1].startswith("error: model model can't be loaded") and "Traceback" not in err
    weights.write_bytes(whole)
    runner.run(*command)


@pytest.fixture
def own(tmp_path: Path, tokenizer: Any) -> Path:
    """A model's folder to spoil."""
    from tests.tiny import save_with_tokenizer

    return save_with_tokenizer(tmp_path / "model", tokenizer)


def change(path: Path, **keys: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    facts = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))


@pytest.mark.parametrize(
    ("tasks", "keys", "sentence"),
    [
        ("piqa", {"eos_token": None, "bos_token": None}, "has no token for the beginning or the end of a text"),
        ("triviaqa", {"eos_token": None}, "(eos_token), by which the answers of triviaqa end"),
        ("gsm8k", {"pad_token": "<pad>"}, "pads with token 49152, but the model knows 49152 tokens only"),
    ],
)
def test_a_tokenizer_without_what_tasks_need_ends_before_a_model_loads(
    tmp_path: Path, own: Path, tasks: str, keys: dict[str, Any], sentence: str
) -> None:
    change(own / "tokenizer_config.json", **keys)
    (own / "special_tokens_map.json").unlink(missing_ok=True)
    runner = Runner(own, tmp_path)
    _, err = runner.run(f"tasks=[{tasks}]", "probe=quality", code=2, before="pass")
    error, probe = err.splitlines()
    assert error.startswith("error: the tokenizer of model ") and sentence in error
    assert probe == "model code imported: False"
    runner.run(f"tasks=[{tasks}]", "probe=sparsity", "dry=true", before="pass")  # which reads no special token


def test_a_byte_order_mark_is_no_part_of_a_text(runner: Runner) -> None:
    texts = [runner.folder / name for name in ("plain", "marked")]
    words = "Words that are long enough for a window or two. " * 400
    texts[0].write_text(words)
    texts[1].write_text(words, encoding="utf-8-sig")
    plans = [runner.run("dry=true", f"probe.perplexity.path={text}")[1] for text in texts]
    assert plans[0] == plans[1], "the same cells"
    from harness.data.text import own_text

    assert own_text(texts[1]) == words


@pytest.mark.parametrize("place", ["model.path", "results", "cwd", "cache"])
def test_a_path_that_is_no_utf8_ends_with_one_sentence(runner: Runner, tiny_folder: Path, place: str) -> None:
    latin = Path(os.fsdecode(os.fsencode(runner.folder) + b"/caf\xe9"))
    latin.mkdir()
    overrides = [f"{place}={latin}"] if place in ("model.path", "results") else []
    if place == "model.path":
        (latin / "config.json").write_text("{}")
    if place == "cwd":
        (runner.folder / "cwd").rmdir()
        latin.rename(latin.parent / latin.name)
        (runner.folder / "cwd").symlink_to(latin)
    if place == "cache":
        runner.env["DYNACT_CACHE"] = str(latin)
    _, err = runner.run(*overrides, code=2, before="pass")
    error, probe = err.splitlines()
    assert "caf\\udce9" in error and "bytes that are not UTF-8" in error
    assert probe == "model code imported: False"


def test_a_terminal_without_a_character_gets_its_code_and_paths_stay_whole_in_a_pipe(runner: Runner) -> None:
    runner.env |= {"PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    results = runner.folder / ("a-long-name-" * 12 + "\u00e9")
    _, err = runner.run("method=dense", "probe=sparsity", "tasks=none", f"results={results}")
    shown = str(results).encode("ascii", "backslashreplace").decode()
    assert f"rows: {shown}/table.csv and {shown}/table.parquet; cells: {shown}/cells" in err.splitlines()


def test_a_key_that_every_cell_must_name_can_be_swept(runner: Runner, tiny_folder: Path, tokenizer: Any) -> None:
    from tests.tiny import save_with_tokenizer

    other = save_with_tokenizer(runner.folder / "another", tokenizer, num_hidden_layers=2)
    runner.always = [o for o in runner.always if not o.startswith("model.path=")]
    _, err = runner.run("-m", f"model.path={tiny_folder},{other}", "method=random", "tasks=none", "dry=true")
    plan = [line.split()[0] for line in err.splitlines()]
    assert [name.split("_")[0] for name in plan] == [tiny_folder.name, tiny_folder.name, "another", "another"]
    _, err = runner.run("dry=true", code=2)
    assert "model.path" in err and len(err.splitlines()) == 1


# --------------------------------------------------------------------------------------------- sweeps


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
def resumed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The same sweep in another folder: stopped by Ctrl-C in its first cell, killed in a later one, then finished."""
    runner = Runner(tiny_folder, tmp_path_factory.mktemp("resumed"))
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


UNSUPPORTED = {
    "cats": "has none",  # no gate
    "cett": "scope=model has nothing to solve for",
    "moefication": "experts of 24 neurons do not divide the 128 neurons",
    "dejavu": "cannot look 3 blocks ahead in the 3 blocks",
}


def test_an_unsupported_pair_is_a_status_and_no_failure(tmp_path: Path, tokenizer: Any) -> None:
    from tests.tiny import save_with_tokenizer

    runner = Runner(save_with_tokenizer(tmp_path / "opt", tokenizer, family="opt"), tmp_path)
    options = ["cett.cett=0.2", "moefication.expert_size=24", "dejavu.predictor=lookahead", "dejavu.lookahead=3"]
    sweep = ["-m", f"method={','.join(UNSUPPORTED)}", *(f"method.{option}" for option in options), "scope=model"]
    _, err = runner.run(*sweep, "probe.names=[sparsity]", "tasks=none")
    statuses = {cell.split("_")[1]: runner.store.view(cell).status for cell in runner.store.cells()}
    assert {status["status"] for status in statuses.values()} == {"unsupported"}
    assert all(sentence in statuses[method]["message"] for method, sentence in UNSUPPORTED.items())
    assert "unsupported" in err and "Traceback" not in err


# ------------------------------------------------------------------------------------------ side by side


@pytest.fixture(scope="module")
def beside(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The same sweep by three processes: stopped by Ctrl-C as soon as something is committed, then finished."""
    runner = Runner(tiny_folder, tmp_path_factory.mktemp("beside"))
    runner.env["OMP_NUM_THREADS"] = "1"
    runner.stopped = runner.interrupt(lambda: len(runner.commits()) >= 1, signal.SIGINT, *SWEEP, "workers=3")
    runner.after_stop = [state(runner.store.view(cell)) for cell in runner.store.cells()]
    runner.kept = runner.commits()
    runner.out, runner.err = runner.run(*SWEEP, "workers=3")
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
