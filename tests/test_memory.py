"""Memory said before a model is loaded, models of a shape, and a user's own models and tasks by config."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig

from harness.data.embedded import embedded_dir
from harness.errors import ConfigError
from harness.model import memory, shapes
from harness.run.config import check
from harness.run.overrides import composed
from tests import tiny

SHAPES = {"llama2-7b-shape": 6.74e9, "llama3-8b-shape": 8.03e9, "llama3-70b-shape": 70.55e9, "qwen3-8b-shape": 8.19e9}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_weights_are_counted_as_the_model_has_them(family: str) -> None:
    model = tiny.make(family)
    wanted = sum(p.numel() for p in model.parameters()) * 2
    assert memory.need(model.config, torch.bfloat16, 1).weights == wanted


@pytest.mark.parametrize(("name", "parameters"), SHAPES.items())
def test_a_shape_is_the_published_one(name: str, parameters: float) -> None:
    shape = yaml.safe_load(Path(f"conf/model/{name}.yaml").read_text())["shape"]
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    assert memory.need(config, torch.bfloat16, 1).weights / 2 == pytest.approx(parameters, rel=2e-3)


def test_a_model_that_does_not_fit_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free", lambda device: 10**9)
    entry = yaml.safe_load(Path("conf/model/llama3-70b-shape.yaml").read_text())
    with pytest.raises(ConfigError, match=r"llama3-70b-shape needs about 141\.\d GB .* 1\.0 GB are free on cpu"):
        shapes.random_model(entry, torch.bfloat16, torch.device("cpu"))


def test_quality_of_a_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="random weights, for latency and memory only: probe quality"):
        check(composed(["model=llama2-7b-shape", "probe.names=[latency,quality]"]))
    check(composed(["model=llama2-7b-shape", "probe.names=[latency]"]))


@torch.no_grad()
def test_a_shape_runs() -> None:
    shape = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    entry = {"name": "small", "shape": shape | {"num_hidden_layers": 2, "num_attention_heads": 4}}
    models = [shapes.random_model(entry, torch.float32, torch.device("cpu")) for _ in range(2)]
    logits = [model(torch.arange(8)[None]).logits for model in models]
    assert torch.isfinite(logits[0]).all() and torch.equal(*logits)


MEASURE = """
import json, re, sys, threading, time
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from harness.model.memory import need
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
stored = AutoConfig.from_pretrained(folder).dtype
kinds = ["RssAnon", "RssFile"] if dtype == stored else ["RssAnon"]  # weights in the file's dtype stay mapped
def held():
    status = open("/proc/self/status").read()
    return sum(int(re.search(kind + r":\\s+(\\d+)", status)[1]) * 1024 for kind in kinds)
wanted = need(AutoConfig.from_pretrained(folder), dtype, 512).total
before, peak, over = held(), [0], threading.Event()
def watch():
    while not over.is_set():
        peak[0] = max(peak[0], held())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
with torch.no_grad():
    for _ in range(2):
        logits = model(torch.arange(512)[None], use_cache=False).logits
        scores = torch.log_softmax(logits.float(), -1)
        del logits, scores
over.set(); thread.join()
print(json.dumps([wanted, peak[0] - before]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(model: str, dtype: str) -> None:
    """Of what a process holds from before the model was loaded; pages that are only read through do not count."""
    folder = str(embedded_dir(model))
    done = subprocess.run([sys.executable, "-c", MEASURE, folder, dtype], capture_output=True, text=True, check=True)
    wanted, peak = json.loads(done.stdout)
    assert wanted == pytest.approx(peak, rel=0.15)
