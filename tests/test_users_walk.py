"""A user's walk by config: a model that transformers saved, and a method outside the repository."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.results.collect import read_table
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


def test_own_model_and_own_method_by_config(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny.save_with_tokenizer(tmp_path / "my-qwen3", tokenizer, family="qwen3")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_text(METHOD)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(300)))
    run = [sys.executable, str(ROOT / "run.py"), "model=local", f"model.path={model}", "method=dense"]
    run += ["+method.largest._target_=mine.Largest", "+method.largest.sparsity=${sparsity}", "+method.largest.power=2"]
    run += ["sparsity=0.5", "probe.names=[quality,sparsity]", "tasks=quick", "tasks.names=[piqa]", "tasks.limit=2"]
    run += [f"probe.perplexity.path={text}", "probe.perplexity.window=64", "probe.perplexity.windows=2"]
    run += ["probe.perplexity.kl_windows=1", "probe.sparsity.windows=2", "dtype=float32", "device=cpu", "logger=none"]
    run += [f"results={tmp_path / 'results'}"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'elsewhere'}"}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = read_table(tmp_path / "results" / "table.parquet")
    rows = table[table["method"] == "dense+largest"]
    assert set(rows["family"].dropna()) == {"qwen3"} and set(rows["model"].dropna()) == {"my-qwen3"}
    assert set(rows["variant"].dropna()) == {"power=2"}
    at_down = (rows["metric"] == "achieved") & (rows["site"] == "mlp_hidden") & rows["layer"].isna()
    assert rows[at_down & (rows["step_phase"] == "all")]["value"].tolist() == [0.5]
    assert (rows["metric"] == "token_perplexity").any() and (rows["task"] == "piqa").any()
