"""Shipped adapters: small shards, hashes that are checked, int8 factors that cost nothing, merged on load."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.errors import ConfigError
from harness.model.activations import ACTIVATIONS, GateActivation
from harness.places import CHECKPOINTS
from harness.training.adapter import Adapter
from harness.training.card import card, read_whole
from harness.training.checkpoints import (
    SHARD_BYTES,
    load_checkpoint,
    pack,
    read_checkpoint,
    save_checkpoint,
    unpack,
)
from harness.training.llama import LINEARS, Model, make_block, norm, rotary
from harness.training.students import base_of

SHIPPED = sorted(path.parent for path in CHECKPOINTS.glob("*/adapter.json"))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def tensors_for(llama: LlamaForCausalLM, rank: int = 4, threshold: float = 0.05) -> dict[str, torch.Tensor]:
    model = Model.of(llama.config.to_dict(), llama.state_dict())
    adapter = Adapter(model, rank, 2.0, 0)
    torch.manual_seed(1)
    tensors = {n: p.detach() + 0.02 * torch.randn_like(p) for n, p in adapter.named_parameters()}
    return tensors | {"threshold": torch.full((2,), threshold)}


def record(activation: str = "relu") -> dict[str, object]:
    return {"name": "tiny", "activation": activation, "factor": 2.0}


def test_round_trip_is_near_and_small(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    tensors = tensors_for(llama)
    save_checkpoint(tmp_path, tensors, record())
    found = read_checkpoint(tmp_path)
    assert (found.name, found.activation, found.factor) == ("tiny", "relu", 2.0)
    assert found.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        worst = value.abs().max() / 200
        torch.testing.assert_close(found.tensors[name], value, atol=float(worst), rtol=1e-3)
    again = pack(found.tensors)
    assert all(torch.equal(value, again[name]) for name, value in pack(tensors).items() if value.dtype == torch.int8)


def test_routers_and_experts_survive(llama: LlamaForCausalLM) -> None:
    tensors = tensors_for(llama) | {
        "router": torch.randn(2, 6, 32),
        "expert_of": torch.arange(48).div(8, rounding_mode="floor").expand(2, 48),
    }
    found = unpack(pack(tensors))
    assert torch.equal(found["expert_of"], tensors["expert_of"])
    torch.testing.assert_close(found["router"], tensors["router"], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu", "silu"])
def test_loaded_model_is_the_trained_student(llama: LlamaForCausalLM, tmp_path: Path, activation: str) -> None:
    tensors = tensors_for(llama)
    save_checkpoint(tmp_path, tensors, record(activation))
    kept = unpack(pack(tensors))
    base = Model.of(llama.config.to_dict(), llama.state_dict())
    linears = {
        n: base.linears[n] * (1 + kept[f"scale.{n}"])[..., None] + 2.0 * (kept[f"b.{n}"] @ kept[f"a.{n}"])
        for n in LINEARS
    }
    tokens = torch.randint(61, (2, 9))
    block = make_block(base.shape, activation, activation)
    cos, sin = rotary(base.shape, torch.arange(9))
    x = base.embedding[tokens]
    for i in range(2):
        w = {n: s[i] for n, s in (linears | base.norms).items()}
        x = block(x, w, cos, sin, kept["threshold"][i], torch.ones(()))[0]
    wanted = norm(x, base.final_norm, base.shape.epsilon) @ base.embedding.T
    load_checkpoint(tmp_path, llama)
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, wanted, atol=1e-4, rtol=1e-4)


def test_shards_stay_small(tmp_path: Path) -> None:
    tensors = {f"a.{i}": torch.randn(3, 10, 300_000) for i in range(4)} | {"threshold": torch.zeros(3)}
    save_checkpoint(tmp_path, tensors, record())
    files = list(tmp_path.glob("adapter-*.safetensors"))
    assert len(files) == 4
    assert all(file.stat().st_size < 16 * 2**20 for file in files)
    assert SHARD_BYTES < 16 * 2**20


def test_bad_checkpoints_say_why(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint 'nothing'"):
        read_checkpoint("nothing")
    save_checkpoint(tmp_path, tensors_for(llama), record())
    (shard,) = tmp_path.glob("adapter-*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match="sha256"):
        read_checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(ConfigError, match="lacks its shard"):
        read_checkpoint(tmp_path)
    shard.write_bytes(content)
    other = LlamaForCausalLM(
        copy.deepcopy(llama.config).__class__(**llama.config.to_dict() | {"intermediate_size": 40})
    )
    with pytest.raises(ConfigError, match="does not fit"):
        load_checkpoint(tmp_path, other)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda p: p.name)
def test_shipped_adapters_are_whole_and_within_bounds(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint.name == folder.name
    assert checkpoint.activation in ACTIVATIONS
    shards = list(folder.glob("*.safetensors"))
    assert {s.name for s in shards} == set(checkpoint.record["sha256"])
    assert all(s.stat().st_size < 16 * 2**20 for s in shards)
    bound = 24 if base_of(checkpoint.record) == "smollm2-135m" else 20  # MiB
    assert sum(file.stat().st_size for file in folder.iterdir()) <= bound * 2**20
    assert all(torch.isfinite(t).all() for t in checkpoint.tensors.values())
    whole = read_whole(folder)
    evaluation = whole["evaluation"]
    assert evaluation["natural"]["perplexity"] == pytest.approx(evaluation["unrounded"]["perplexity"], rel=0.01)
    assert (folder / "README.md").read_text() == card(whole), "a card says what its record and its figures hold"


def test_all_shipped_adapters_fit_the_repository() -> None:
    total = sum(file.stat().st_size for folder in SHIPPED for file in folder.iterdir())
    assert total <= (110 + 64) * 2**20  # those of the first model, and what the second family may take


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 0.3, 2.0, float("nan")])
    plain = GateActivation(name, 0.0)(x)
    assert plain[-1].isnan()
    if name == "silu":
        torch.testing.assert_close(plain[:-1], torch.nn.functional.silu(x[:-1]))
        return
    wanted = torch.relu(x[:-1]) ** (2 if name == "relu2" else 1)
    assert torch.equal(plain[:-1], wanted)
    cut = GateActivation(name, 0.5)(x)
    assert cut[:-1].tolist() == [0.0, 0.0, 0.0, 0.0, 4.0 if name == "relu2" else 2.0]
    assert GateActivation(name, 0.5)(x.bfloat16()).dtype == torch.bfloat16


def test_drelu_is_relu_on_both_halves() -> None:
    gate, up = torch.tensor([-1.0, 1.0, 1.0, -1.0]), torch.tensor([1.0, -1.0, 2.0, -2.0])
    assert ACTIVATIONS["drelu"].hidden(gate, up).tolist() == [0.0, 0.0, 2.0, 0.0]
    assert ACTIVATIONS["relu"].hidden(gate, up).tolist() == [0.0, -1.0, 2.0, 0.0]
