"""A user's walk by config: a model that transformers saved, and a method outside the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.data import own_tasks as own
from harness.data.own_tasks import source_of
from harness.errors import ConfigError
from harness.results.collect import read_table
from harness.run.config import CellConfig, check
from harness.run.overrides import composed
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
METHOD = '''
from dataclasses import dataclass
from typing import ClassVar

from harness.execution.method import Method
from harness.model.selection import TopK, top_k_count
from harness.model.sees import INPUT


@dataclass(frozen=True)
class Largest(Method):
    """Keeps the largest inputs of down."""

    power: float = 1.0
    name: ClassVar[str] = "largest"
    paper: ClassVar[str] = "-"

    @property
    def sites(self):
        return {"mlp_hidden": INPUT} if self.sparsity else {}

    def select(self, plan, site, layer, x, step):
        return TopK(x.abs() ** self.power, top_k_count(x.shape[-1], self.sparsity))
'''


TASK = """
include: common.txt
task: sums
doc_to_text: "{{a}} plus {{b}} is"
doc_to_choice: ["{{right}}", "{{wrong}}"]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DOCS}}
output_type: multiple_choice
test_split: test
"""


def own_tasks(folder: Path) -> Path:
    folder.mkdir()
    docs = folder / "docs.jsonl"
    docs.write_text("".join(json.dumps({"a": a, "b": 2, "right": f"{a + 2}", "wrong": "ten"}) + "\n" for a in range(3)))
    (folder / "common.txt").write_text(COMMON.replace("DOCS", str(docs)))
    (folder / "sums.yaml").write_text(TASK)
    return folder


def test_own_model_and_own_method_by_config(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny.save_with_tokenizer(tmp_path / "my-qwen3", tokenizer, family="qwen3")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_text(METHOD)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(300)))
    run = [sys.executable, str(ROOT / "run.py"), "model=local", f"model.path={model}", "method=dense"]
    run += ["+method.largest._target_=mine.Largest", "+method.largest.sparsity=${sparsity}", "+method.largest.power=2"]
    run += ["sparsity=0.5", "probe.names=[quality,sparsity]", "tasks=quick", "tasks.names=[piqa,sums]", "tasks.limit=2"]
    run += [f"tasks.include_path={own_tasks(tmp_path / 'tasks')}"]
    run += [f"probe.perplexity.path={text}", "probe.perplexity.window=64", "probe.perplexity.windows=2"]
    run += ["probe.perplexity.kl_windows=1", "probe.sparsity.windows=2", "dtype=float32", "device=cpu", "logger=none"]
    run += [f"results={tmp_path / 'results'}"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'elsewhere'}"}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = read_table(tmp_path / "results" / "table.parquet")
    rows = table[table["method"] == "dense+largest"]
    assert set(rows["family"].dropna()) == {"qwen3"} and set(rows["model"].dropna()) == {"my-qwen3"}
    assert set(rows["variant"].dropna()) == {"power=2.0"}
    at_down = (rows["metric"] == "achieved") & (rows["site"] == "mlp_hidden") & rows["layer"].isna()
    assert rows[at_down & (rows["step_phase"] == "all")]["value"].tolist() == [0.5]
    assert (rows["metric"] == "token_perplexity").any() and (rows["task"] == "piqa").any()
    sums = rows[(rows["task"] == "sums") & (rows["metric"] == "acc")]
    assert sums["n"].tolist() == [2] and set(sums["split"]) == {"test"}
    assert (table["method"] == "dense").any() and sums["dense_value"].notna().all()


def test_an_own_task_is_a_part_of_the_cell_wherever_it_lies(tmp_path: Path) -> None:
    first, second = own_tasks(tmp_path / "one"), own_tasks(tmp_path / "two")
    for folder in (first, second):  # the same words, which name their documents by a path of their own
        (folder / "common.txt").write_text(COMMON.replace("DOCS", "docs.jsonl"))

    def cell(folder: Path) -> CellConfig:
        return check(composed(["tasks.names=[sums]", f"tasks.include_path={folder}", "device=cpu", "dtype=float32"]))

    one = cell(first)
    assert one.id == cell(second).id
    (second / "sums.yaml").write_text(TASK.replace("plus", "and"))
    own.own_tasks.cache_clear()
    assert one.id != cell(second).id
    assert own.own_task("sums", source_of(one.plain)) is not None


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.yaml": "include: none.yaml"}, "none.yaml can't be read"),
        ({"a.yaml": "task: [x"}, "a.yaml can't be read"),
        ({"a.yaml": "task: x", "b.yaml": "task: x"}, "two tasks with the name x"),
        ({"a.yaml": "task: piqa"}, "a task piqa, which is one of ours"),
        ({"a.yaml": "task: x"}, "unknown task sums"),
        ({}, "holds no YAML file that names a task"),
    ],
)
def test_a_folder_of_tasks_that_makes_no_sense_is_one_sentence(
    files: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        check(composed(["tasks.names=[sums]", f"tasks.include_path={tmp_path}"]))
