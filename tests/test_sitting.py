"""A sitting: what is planned and run, and the way from a model to rows of its counterpart, on tiny models."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

import train
from harness.claims.pairs import lineage
from harness.errors import ConfigError
from harness.results.collect import read_table
from harness.run import app
from harness.training import data, sitting, students
from harness.training.loop import CARRIED, STATE
from tests import tiny

WORDS = [f"w{number}" for number in range(60)]
SMALL = (
    *("train.steps=20", "train.batch=2", "train.length=16", "train.rank=2", "train.warmup=2", "log_every=5"),
    *("text.tokens=200", "text.batch=4", "text.length=25", "text.longest=8", "text.heldout=40", "device=cpu"),
    *("evaluate.drops=[0.5]", "evaluate.windows=2", "evaluate.batch=2"),
)


def saved(folder: Path, family: str) -> Path:
    """A tiny model of two layers with a tokenizer of bytes, as a local folder."""
    known = {word: n for n, word in enumerate(["<s>", "</s>", "<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    plain = Tokenizer(BPE(known, []))
    plain.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    return tiny.save_with_tokenizer(folder, tokenizer, family=family, num_hidden_layers=2)


@pytest.fixture
def called(monkeypatch):
    """train.py called in this process: the exit code, 0 where it returns."""

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        try:
            train.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    yield call
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_from_a_model_to_rows_of_its_counterpart(family, tmp_path, monkeypatch, called, capsys):
    """Text, training that is stopped, carried and gone on with, a second variant from it, evaluation, merge, a cell."""
    text = " ".join(WORDS[i * i % 60] for i in range(400))
    monkeypatch.setattr(data, "training_text", lambda: text)
    monkeypatch.setattr("harness.data.text.evaluation_text", lambda: text[::-1].replace("w", " w"))
    monkeypatch.setattr(data, "SCORED_WINDOW", 16)
    monkeypatch.setenv("DYNACT_CACHE", str(tmp_path / "cache"))
    model, folder = saved(tmp_path / "tiny", family), tmp_path / "out"
    common = ("model=local", f"model.path={model}", f"folder={folder}", "train.seed=2", *SMALL)

    assert called(*common, "do=[]") == 0
    assert int(load_file(folder / "text" / "real.safetensors")["separator"]) == 2
    assert called(*common, "do=[text]", "text.piece=0") == 0
    assert called(*common, "train=relu", "do=[train]") == 2
    assert "own text 5" in capsys.readouterr().err
    assert called(*common, "do=[text]") == 0
    assert sorted(path.name for path in (folder / "text").glob("heldout-*")) == [
        f"heldout-{i}.safetensors" for i in (4, 5)
    ]
    starts = torch.cat([load_file(path)["tokens"] for path in (folder / "text").glob("own-*-00.safetensors")])
    assert (starts.view(-1, 25)[:, 0] == 2).all(), "every text begins with the separator"

    assert called(*common, "train=relu2", "do=[train]") == 2
    assert (
        "there is no tiny-relu-seed2 to go on from; `python train.py model=tiny train=relu train.seed=2`"
        in capsys.readouterr().err
    )
    assert called(*common, "train=relu", "do=[train,evaluate]", "stop_after_s=0") == 3
    run = folder / "tiny-relu-seed2"
    assert (run / CARRIED).exists() and not (run / "adapter").exists()
    (run / STATE).unlink()  # as on another machine
    assert called(*common, "train=relu") == 0
    said = capsys.readouterr().out
    assert "going on from step 5" in said and "perplexity" in said
    assert called(*common, "train=relu2", "train.steps=10") == 0
    card = (folder / "tiny-relu2-seed2" / "adapter" / "README.md").read_text()
    assert "# tiny-relu2-seed2: tiny with relu2" in card and "going on from `tiny-relu-seed2`" in card

    (tmp_path / "text.txt").write_text(text)
    cell = ["model=local", f"model.path={model}", f"model.adapter={folder / 'tiny-relu2-seed2' / 'adapter'}"]
    cell += [
        "method=teal",
        "sparsity=0.5",
        "tasks=none",
        "probe.names=[quality,sparsity]",
        "dtype=float32",
        "device=cpu",
    ]
    cell += [f"{key}.path={tmp_path / 'text.txt'}" for key in ("calibration", "probe.perplexity")]
    cell += [
        "calibration.tokens=64",
        "calibration.window=32",
        "probe.perplexity.window=32",
        "probe.perplexity.windows=2",
    ]
    cell += [
        "probe.perplexity.kl_windows=1",
        "probe.sparsity.windows=2",
        "logger=none",
        f"results={tmp_path / 'results'}",
    ]
    assert app.main(cell) == 0
    rows = read_table(tmp_path / "results" / "table.parquet")
    assert set(rows["model"].dropna()) == {"tiny-relu2-seed2"} and set(rows["activation"].dropna()) == {"relu2"}
    assert lineage("tiny-relu2-seed2") == ("tiny", 2)
    assert (rows["metric"] == "token_perplexity").any()


# ---------------------------------------------------------------------------------------------- the plan


def job(name: str, seconds: float, *after: str, done: Path = Path("nowhere")) -> sitting.Job:
    return sitting.Job(name, (f"train={name}",), seconds, 0.0, 0.0, after, done)


def test_the_plan_runs_first_what_others_wait_for():
    left = [job("t0", 2), job("t1", 2), job("control", 7, "t0", "t1"), job("relu", 7, "t0", "t1")]
    left += [job("relu2", 6, "t0", "t1", "relu")]
    planned = [(device, begin, planned.name) for device, begin, planned in sitting.plan(left, ["a", "b"])]
    assert planned == [("a", 0, "t0"), ("b", 0, "t1"), ("a", 2, "relu"), ("b", 2, "control"), ("a", 9, "relu2")]
    alone = [planned.name for _, _, planned in sitting.plan(left, ["a"])]
    assert alone == ["t0", "t1", "relu", "control", "relu2"]


def test_jobs_are_what_is_left(tmp_path, monkeypatch):
    folder = f"folder={tmp_path}"
    found = {
        job.name: job for job in sitting.jobs("smollm2-135m", ["control", "relu", "relu2"], [1, 2], True, [folder])
    }
    names = [f"{variant}-seed{seed}" for seed in (1, 2) for variant in ("control", "relu", "relu2")]
    assert sorted(found) == sorted([*names, "text 1/0", "text 1/1", "text 2/0", "text 2/1"])
    assert found["relu2-seed2"].after == ("text 2/0", "text 2/1", "relu-seed2")
    assert found["text 2/1"].done.name == "heldout-5.safetensors"
    minutes = found["relu-seed1"].seconds / 60
    assert minutes == pytest.approx((60 + 2900 * 24 * 1024 / 235_000 + 60) / 60, rel=1e-6)
    found["relu-seed1"].done.parent.mkdir(parents=True)
    found["relu-seed1"].done.touch()
    assert "relu-seed1" not in {j.name for j in sitting.jobs("smollm2-135m", ["relu"], [1], False, [folder])}
    with pytest.raises(ConfigError, match="relu2-seed3 goes on from relu-seed3, which is not there"):
        sitting.jobs("smollm2-135m", ["relu2"], [3], False, [folder])
    assert sitting.jobs("smollm2-135m", ["relu2"], [0], False, [folder]), "the first seed's relu is shipped"


def test_the_second_familys_plan_fits_sittings(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--model", "qwen2.5-coder-0.5b", "--devices", "cuda:0,cuda:1", "--plan"]
    assert sitting.main(given) == 0
    said = capsys.readouterr().out
    assert "5 to run, about 40 minutes in all" in said
    assert "train.seed=0 train=relu2 do=[train,evaluate]" in said
    assert [*tmp_path.iterdir()] == []


STUB = """
import sys, time
name = next(word for word in sys.argv if word.startswith("train="))
print("said", name, next(word for word in sys.argv if word.startswith("device=")))
time.sleep(0.05)
sys.exit({"train=stopped": 3, "train=broken": 1}.get(name, 0))
"""


def test_a_sitting_runs_what_it_can(tmp_path, monkeypatch, capsys):
    """What failed or was stopped is not begun again, nor what waits for it; the rest runs on both devices."""
    (tmp_path / "train.py").write_text(STUB)
    monkeypatch.setattr(sitting, "ROOT", tmp_path)
    left = [job("first", 3), job("stopped", 1), job("broken", 1), job("second", 1, "first"), job("never", 1, "stopped")]
    codes = sitting.run(left, ["a", "b"], time.monotonic() + 60, tmp_path / "logs")
    assert codes == {"first": 0, "stopped": 3, "broken": 1, "second": 0}
    assert "said train=second device=" in (tmp_path / "logs" / "second.log").read_text()
    assert "broken failed (1): said train=broken" in capsys.readouterr().out
    late = [replace(job("late", 1), least=30.0)]
    assert sitting.run(late, ["a"], time.monotonic() + 20, tmp_path / "logs") == {}


def test_names_of_students():
    assert students.checkpoint_name("smollm2-135m", "relu", 0) == "relu"
    assert students.checkpoint_name("smollm2-135m", "relu", 2) == "relu-seed2"
    assert students.checkpoint_name("qwen2.5-coder-0.5b", "relu", 0) == "qwen2.5-coder-0.5b-relu"
    assert students.model_name({"name": "relu"}) == "smollm2-135m-relu", "the first records name no model"
    record = {"name": "x", "model": "qwen2.5-coder-0.5b", "variant": "relu2", "recipe": {"seed": 3}}
    assert students.model_name(record) == "qwen2.5-coder-0.5b-relu2-seed3"
