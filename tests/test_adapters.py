"""`model=smollm2-135m-relu` and its kin: the shipped checkpoints as models."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch

from harness.claims.pairs import lineage
from harness.errors import ConfigError
from harness.places import CHECKPOINTS, RESULTS
from harness.run import session
from harness.run.canonical import canonical
from harness.run.config import CellConfig, check
from harness.run.overrides import composed, rewrite
from harness.training import scores, students
from harness.training.card import read_whole
from tests.test_experiments import cells

SHIPPED = sorted(path.parent.name for path in CHECKPOINTS.glob("*/adapter.json"))


def config(*overrides: str) -> CellConfig:
    return check(composed(rewrite(["method=dense", "tasks=none", *overrides], multirun=False)))


def test_every_shipped_checkpoint_has_a_model_entry():
    assert SHIPPED
    for name in SHIPPED:
        entry = name if name.startswith("qwen") else f"smollm2-135m-{name}"
        assert config(f"model={entry}")["model"]["adapter"] == name


@pytest.mark.parametrize("name", ["relu", "drelu"])
def test_a_checkpoint_loads_merged_with_its_zeros(name):
    loaded = session.load(config(f"model=smollm2-135m-{name}", "dtype=float32"))
    view = loaded.view
    assert view.activation == name
    zeros = []
    handles = [
        b.down.register_forward_pre_hook(lambda _m, args: zeros.append((args[0] == 0).float().mean()))
        for b in view.blocks
    ]
    ids = loaded.tokenizer(
        "The capital of France is Paris, and the Seine runs through it.", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        logits = view.model(ids).logits
    for handle in handles:
        handle.remove()
    assert logits.isfinite().all()
    assert torch.stack(zeros).mean() > 0.5
    base = session.load(config("dtype=float32")).view
    assert base.activation == "silu"
    assert base.fingerprint != view.fingerprint


def test_an_unknown_adapter_is_one_sentence():
    with pytest.raises(ConfigError, match="is no checkpoint: choose from .*relu"):
        config("model=smollm2-135m-relu", "model.adapter=rellu")


@pytest.mark.parametrize("variant", ["control", "relu", "relu2", "prosparse"])
def test_a_counterpart_that_is_not_trained_yet_says_which_command_makes_it(variant, monkeypatch, tmp_path):
    monkeypatch.setattr(students, "CHECKPOINTS", tmp_path)
    made_by = f"`python train.py model=qwen2.5-coder-0.5b train={variant}` makes it"
    with pytest.raises(ConfigError, match=f"{variant} is not trained here: {made_by}"):
        config(f"model=qwen2.5-coder-0.5b-{variant}")
    with pytest.raises(
        ConfigError, match="smollm2-135m-relu-seed9 .* `python train.py train=relu train.seed=9` makes it"
    ):
        config("model=smollm2-135m-relu", "model.seed=9")


@pytest.fixture
def second_run(tmp_path, monkeypatch):
    """A run of relu with seed 2 where train.py leaves it; the shipped one's tensors serve."""
    monkeypatch.setattr(students, "TRAINED", tmp_path / "training")
    folder = tmp_path / "training" / "smollm2-135m" / "relu-seed2" / "adapter"
    shutil.copytree(CHECKPOINTS / "relu", folder, symlinks=True)
    record = json.loads((folder / "adapter.json").read_text())
    record |= {"name": "relu-seed2", "model": "smollm2-135m", "variant": "relu"}
    record["recipe"]["seed"] = 2
    (folder / "adapter.json").write_text(json.dumps(record))
    return folder


def test_rows_say_the_seed_of_the_training_run_however_it_was_asked_for(second_run):
    """By seed, by name and by folder: one cell, whose name claims read the seed from."""
    asked = [
        config("model=smollm2-135m-relu", "model.seed=2"),
        config("model=smollm2-135m-relu", "model.adapter=relu-seed2"),
        config("model=smollm2-135m-relu", f"model.adapter={second_run}"),
        config("model=smollm2-135m", f"model.adapter={second_run}"),
    ]
    assert {cell.model_name for cell in asked} == {"smollm2-135m-relu-seed2"}
    assert len({cell.id for cell in asked}) == 1
    assert asked[0].id.startswith("smollm2-135m-relu-seed2_")
    assert CellConfig(canonical(asked[0].plain)).id == asked[0].id, "canonical facts come out as they are"
    assert lineage(asked[0].model_name) == ("smollm2-135m", 2)
    first = config("model=smollm2-135m-relu")
    assert first.id == config("model=smollm2-135m-relu", "model.seed=0").id != asked[0].id
    assert lineage(first.model_name) == ("smollm2-135m", 0)


def test_what_is_measured_of_a_student_makes_no_other_cell_of_it(second_run, monkeypatch):
    """Scores go beside its record, into the figures and the card; other weights are another student."""
    asked = ["model=smollm2-135m-relu", "model.seed=2"]
    before, record = config(*asked).id, (second_run / "adapter.json").read_bytes()
    line = {"items": 10, "base": 0.5, "score": 0.4, "difference": -0.1, "stderr": 0.05}
    monkeypatch.setattr(scores, "CHECKPOINTS", second_run.parent)
    monkeypatch.setattr(scores, "scores", lambda *_: {"device": "cpu", "dtype": "float32", "scores": {"piqa": line}})
    scores.main(second_run)
    assert (second_run / "adapter.json").read_bytes() == record
    whole = read_whole(second_run)
    assert whole["evaluation"]["tasks"]["scores"] == {"piqa": line} and whole["evaluation"]["natural"]
    assert "| piqa | 10 | 50.0% | 40.0% | -10.0, 5.0 points |" in (second_run / "README.md").read_text()
    assert config(*asked).id == before
    other = json.loads(record)
    other["sha256"] = dict.fromkeys(other["sha256"], "0" * 64)
    (second_run / "adapter.json").write_text(json.dumps(other))
    assert config(*asked).id != before


@pytest.mark.parametrize("name", ["control", "relu", "relu2"])
def test_the_study_knows_the_shipped_students_by_their_records(name):
    """A record that is written anew would make all cells of its student stale."""
    cells = pd.read_parquet(RESULTS / "study" / "cells.parquet", columns=["config"])["config"].map(json.loads)
    known = {cell["model"].get("fingerprint") for cell in cells if cell["model"].get("adapter") == name}
    assert config(f"model=smollm2-135m-{name}")["model"]["fingerprint"] in known


def test_a_name_never_hides_another_adapter():
    assert config("model=smollm2-135m-relu", "model.adapter=prosparse").model_name == "smollm2-135m-prosparse"
    assert config("model=smollm2-135m-relu", "model.weight_format=int8").model_name == "smollm2-135m-relu-int8-g32"


def test_a_seed_is_of_a_counterpart():
    with pytest.raises(ConfigError, match="model.seed is of a trained counterpart"):
        config("model=smollm2-135m", "model.seed=2")


def test_the_experiment_takes_the_seeds_that_are_trained(second_run):
    found = cells("counterparts", "size=smoke", "grid.seeds='0,2'", "grid.students=smollm2-135m-relu")
    assert {cell.model_name for cell in found} == {"smollm2-135m-relu", "smollm2-135m-relu-seed2"}
    with pytest.raises(ConfigError, match="smollm2-135m-control-seed2 is not trained here"):
        cells("counterparts", "size=smoke", "grid.seeds='2'")
