"""A little of `make fuzz` in every run of the suite: damaged and hostile files end in ConfigError or are read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from harness import reading
from harness.errors import ConfigError, DamagedError
from harness.places import RESULTS
from harness.run import plan
from harness.training.checkpoints import read_checkpoint, save_checkpoint
from tests import fuzz

EXAMPLES = 12
COUNT = RESULTS / "bench" / "fuzz.json"


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[fuzz.Target]:
    return fuzz.targets(tmp_path_factory.mktemp("fuzz"))


def test_damaged_files_end_in_one_sentence_or_are_read(targets: list[fuzz.Target]) -> None:
    tally: Counter[str] = Counter()
    for number, target in enumerate(targets):
        if target.share >= 1:
            fuzz.run(target, EXAMPLES, tally, number)
    assert tally["inputs"] > 100 and tally["refused"] > 50 and tally["read"] > 20
    assert tally["refused"] + tally["read"] == tally["inputs"]


def test_the_fuzzer_notices_another_error(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": {"b": 1}}')
    with pytest.raises(BaseException, match="a"):
        fuzz.run(fuzz.Target("careless", lambda: json.loads(path.read_bytes())["a"]["b"], path), 200, Counter())
    assert path.read_text() == '{"a": {"b": 1}}'


@pytest.mark.skipif(not COUNT.exists(), reason="make fuzz writes it")
def test_the_committed_count_has_no_other_errors() -> None:
    told = json.loads(COUNT.read_text())
    assert told["inputs"] >= 100_000 and told["other_errors"] == 0
    assert sum(line["inputs"] for line in told["by_file"].values()) == told["inputs"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.yaml", b"a: !!python/object/apply:os.system [exit]", "could not determine a constructor"),
        ("a.yaml", b"a: &a [1]\nb: [*a, *a]", "an alias"),
        ("a.yaml", b"1: x", "a key that is no text"),
        ("a.yaml", b"a: 2026-01-01", "date has no form in JSON"),
        ("a.json", b"[" * 100_000, "recursion"),
        ("a.json", b'{"a": "\\ud800"}', "surrogates"),
        ("a.json", b"[1]", "no JSON object"),
        ("a.parquet", b"PAR1 and no more", "cut short or altered"),
        ("a.safetensors", b"\x80\x04}q\x00.", "cut short or altered"),  # a pickle
    ],
)
def test_what_is_no_plain_data_is_refused(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    read = {"yaml": reading.read_yaml, "json": reading.read_json}.get(path.suffix[1:])
    read = read or {"parquet": reading.read_parquet, "safetensors": reading.read_tensors}[path.suffix[1:]]
    with pytest.raises(DamagedError, match=sentence):
        read(path)


def test_a_checkpoint_leads_out_of_no_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(save({"threshold": torch.ones(1)}))
    save_checkpoint(tmp_path / "s", {"threshold": torch.ones(1)}, {"name": "s", "activation": "relu", "factor": 1.0})
    record = tmp_path / "s/adapter.json"
    for climbing in ("../outside.safetensors", str(outside)):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": {climbing: "x"}}))
        with pytest.raises(DamagedError, match="a shard is called"):
            read_checkpoint(tmp_path / "s")


def test_pickled_weights_are_refused_before_anything_reads_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(ConfigError, match="pickled"):
        plan.read(["model=local", f"model.path={tmp_path}", "method=dense", "tasks=none"], multirun=False)


@pytest.mark.parametrize("target", ["teal", "os.system", "methods.nothing.X", "json.JSONDecoder", "pathlib"])
def test_a_target_that_is_no_method_is_one_sentence(target: str) -> None:
    with pytest.raises(ConfigError, match=f"_target_={target} of method .* (can't be imported|is no method)"):
        plan.read(["method=dense", f"+method.mine._target_={target}"], multirun=False)
