"""`model=smollm2-135m-relu` and its kin: the shipped checkpoints as models."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError
from harness.places import CHECKPOINTS
from harness.run import session
from harness.run.config import CellConfig, check
from harness.run.overrides import composed

SHIPPED = sorted(path.parent.name for path in CHECKPOINTS.glob("*/adapter.json"))


def config(*overrides: str) -> CellConfig:
    return check(composed(["method=dense", "tasks=none", *overrides]))


def test_every_shipped_checkpoint_has_a_model_entry():
    assert SHIPPED
    for name in SHIPPED:
        assert config(f"model=smollm2-135m-{name}")["model"]["adapter"] == name


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
