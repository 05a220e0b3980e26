"""Counterparts of a second family and of further seeds: a Qwen2 is trained as a LLaMA is, and rows name the seed."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from harness.errors import ConfigError
from harness.training import budget, losses
from harness.training.adapter import Adapter
from harness.training.checkpoints import load_checkpoint, pack, save_checkpoint, unpack
from harness.training.data import Batches, separator_of
from harness.training.evaluate import evaluate
from harness.training.generate import starts, write
from harness.training.llama import LINEARS, Model, Shape, make_block, norm, rotary
from harness.training.loop import CARRIED, STATE, Recipe, Trainer
from harness.training.losses import head_divergence, rows_at_once
from tests import tiny

CPU = torch.device("cpu")
QWEN_05B = Shape(24, 896, 4864, 14, 2, 151_936, 1e6, 1e-6)
SMOLLM2 = Shape(30, 576, 1536, 9, 3, 49_152, 1e5, 1e-5)


@pytest.fixture(scope="module")
def qwen() -> Qwen2ForCausalLM:
    return tiny.make("qwen2", tie_word_embeddings=False, num_hidden_layers=2, rope_theta=1e6)


@pytest.fixture(scope="module")
def model(qwen: Qwen2ForCausalLM) -> Model:
    return Model.of(qwen.config.to_dict(), qwen.state_dict())


@pytest.fixture(scope="module")
def batches() -> Batches:
    own, real = tiny.tokens(2, 4000).int()
    return Batches(own, real, real_share=0.25, batch=4, length=24, seed=3)


def recipe(**changes: object) -> Recipe:
    return replace(Recipe("tiny", "relu", steps=40, batch=4, length=24, rank=4, warmup=2), **changes)


def logits_of(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    block = make_block(model.shape, "silu", "silu")
    cos, sin = rotary(model.shape, torch.arange(tokens.shape[1]))
    x = model.embedding[tokens]
    for i in range(model.shape.layers):
        x = block(x, model.layer(i), cos, sin, torch.zeros(()), torch.ones(()))[0]
    return norm(x, model.final_norm, model.shape.epsilon) @ model.head.T


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_block_equals_the_hugging_face_model(family: str, theta: float) -> None:
    theirs = tiny.make(family, rope_theta=theta, num_attention_heads=8)
    ours, tokens = Model.of(theirs.config.to_dict(), theirs.state_dict()), tiny.tokens(3, 40)
    wanted = theirs(tokens).logits
    assert (logits_of(ours, tokens) - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))
    assert set(ours.biases) == ({"q.bias", "k.bias", "v.bias"} if family == "qwen2" else set())


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_files_own(tied: bool) -> None:
    """Embedded models that were tied have two, which their GGUF file rounds apart."""
    theirs = tiny.make("qwen2", tie_word_embeddings=tied)
    ours, tokens = Model.of(theirs.config.to_dict(), theirs.state_dict()), tiny.tokens(2, 9)
    torch.testing.assert_close(logits_of(ours, tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    moved = ours.to(CPU, torch.bfloat16)
    assert (ours.head is ours.embedding) == (moved.head is moved.embedding) == tied


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "gemma"}, "only llama and qwen2 are known"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rotary positions are scaled"),
        ({"use_sliding_window": True}, "attend to a window"),
        ({"attention_bias": True}, "has biases"),
        ({"head_dim": 32}, "not as wide together"),
    ],
)
def test_what_the_block_can_not_do_is_one_sentence(qwen: Qwen2ForCausalLM, change: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Shape.of(qwen.config.to_dict() | change)


def test_written_text_is_greedy_at_low_temperature(qwen: Qwen2ForCausalLM, model: Model, monkeypatch) -> None:
    monkeypatch.setattr("harness.training.generate.rows_at_once", lambda *sizes: rows_at_once(*sizes, most=0))
    tokens, given = starts(tiny.tokens(1, 500)[0], 3, 16, 2, 5, 0.4, torch.Generator().manual_seed(0), separator=9)
    assert (tokens[:, 0] == 9).all()
    begun = tokens.clone()
    write(model, tokens, given, torch.full((3,), 1e-5), seed=0, kernel=False)
    for row, count in zip(range(3), given.tolist(), strict=True):
        assert torch.equal(tokens[row, :count], begun[row, :count])
        wanted = qwen(tokens[row : row + 1]).logits.argmax(-1)[0]
        assert torch.equal(tokens[row, count:], wanted[count - 1 : -1])


def test_texts_begin_with_the_separator_of_the_tokenizer() -> None:
    class Tokenizer:
        bos_token_id: int | None = 1
        eos_token_id: int | None = 2

        def __init__(self, **vocabulary: int) -> None:
            self.vocabulary = vocabulary

        def get_vocab(self) -> dict[str, int]:
            return self.vocabulary

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [self.vocabulary[letter] for letter in text]

    assert separator_of(Tokenizer(**{"<|endoftext|>": 0}), None) == 0  # whatever sequences begin with otherwise
    assert separator_of(Tokenizer(a=5), None) == 1
    assert separator_of(Tokenizer(a=5), "a") == 5
    with pytest.raises(ConfigError, match="'aa' is 2 tokens of this model"):
        separator_of(Tokenizer(a=5), "aa")
    none = Tokenizer(a=5)
    none.bos_token_id = None
    assert separator_of(none, None) == 2


# ------------------------------------------------------------------------------------------------- bounds


def test_no_piece_of_logits_is_larger_than_the_bound() -> None:
    assert rows_at_once(24 * 1024, 49_152) == 8192  # what the first counterparts were trained with
    assert rows_at_once(5120, 49_152) == 5120
    for rows, vocabulary in ((24 * 1024, 151_936), (5120, 151_936), (511, 151_936), (7919, 151_936), (3, 10**9)):
        at_once = rows_at_once(rows, vocabulary)
        assert at_once == 1 or 4 * at_once * vocabulary <= losses.PIECE_BYTES
        assert at_once == rows or rows % at_once == 0 or 2 * 4 * (at_once + 1) * vocabulary > losses.PIECE_BYTES


def test_pieces_change_nothing() -> None:
    torch.manual_seed(0)
    student, teacher, head = torch.randn(12, 8).requires_grad_(), torch.randn(12, 8), torch.randn(30, 8)
    whole = head_divergence(student, teacher, head, chunk=12)
    pieces = head_divergence(student, teacher, head, chunk=5)
    torch.testing.assert_close(whole, pieces)
    slopes = [torch.autograd.grad(value, student)[0] for value in (whole, pieces)]
    torch.testing.assert_close(*slopes)


def test_sizes_are_those_of_the_tensors(model: Model) -> None:
    adapter = Adapter(model, 5, 2.0, 0)
    tensors = dict(adapter.named_parameters())
    assert budget.trained_values(model.shape, 5) == sum(p.numel() for p in tensors.values())
    packed = pack({name: p.detach() for name, p in tensors.items()})
    assert budget.shipped_bytes(model.shape, 5) == sum(p.nbytes for p in packed.values())


def test_the_second_family_fits_what_it_has() -> None:
    """Adapters of 20 MiB (and 1 for the card), a GPU of 80 GB, and a state of 60 MB."""
    import yaml

    given = yaml.safe_load(Path("conf/budget/qwen2.5-coder-0.5b.yaml").read_text())
    assert given["rank"] == budget.fitting_rank(QWEN_05B, 20 * 2**20 - 2**17) == 36
    three = 2 * budget.shipped_bytes(QWEN_05B, given["rank"]) + budget.shipped_bytes(QWEN_05B, given["control_rank"])
    assert three < 47 * 2**20
    assert budget.training_bytes(QWEN_05B, given["rank"], given["batch"] * 1024) < 60e9
    assert budget.writing_bytes(QWEN_05B, 5120, 384) < 60e9
    for shape, rank in ((QWEN_05B, given["rank"]), (SMOLLM2, 64)):
        assert 2 * budget.trained_values(shape, rank) < 45e6
    assert budget.training_bytes(SMOLLM2, 64, 16 * 1024) == pytest.approx(22e9, rel=0.15)  # 20 GB were seen


# -------------------------------------------------------------------------------------------- training


def test_the_second_family_learns(model: Model, batches: Batches) -> None:
    control = Trainer(recipe(activation="silu"), model, batches, CPU)
    assert float(control.advance()["kl"]) == pytest.approx(0, abs=1e-6)
    trainer = Trainer(recipe(steps=30, warmup=5), model, batches, CPU)
    curve = [float(trainer.advance()["kl"]) for _ in range(30)]
    assert curve[-1] < 0.8 * curve[0]
    assert evaluate(model, model, "silu", torch.zeros(2), tiny.tokens(2, 16))["kl"] == pytest.approx(0, abs=1e-9)


def test_a_merged_student_is_the_trained_one(qwen: Qwen2ForCausalLM, model: Model, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = {n: p.detach() + 0.02 * torch.randn_like(p) for n, p in Adapter(model, 4, 2.0, 0).named_parameters()}
    tensors["threshold"] = torch.full((2,), 0.05)
    save_checkpoint(tmp_path, tensors, {"name": "tiny", "activation": "relu", "factor": 2.0})
    kept = unpack(pack(tensors))
    linears = {
        n: w * (1 + kept[f"scale.{n}"])[..., None] + 2.0 * (kept[f"b.{n}"] @ kept[f"a.{n}"])
        for n, w in model.linears.items()
    }
    student, tokens = replace(model, linears=linears), tiny.tokens(2, 9)
    block, (cos, sin) = make_block(model.shape, "relu", "relu"), rotary(model.shape, torch.arange(9))
    x = model.embedding[tokens]
    for i in range(2):
        x = block(x, student.layer(i), cos, sin, kept["threshold"][i], torch.ones(()))[0]
    merged = copy.deepcopy(qwen)
    load_checkpoint(tmp_path, merged)
    wanted = norm(x, model.final_norm, model.shape.epsilon) @ model.head.T
    torch.testing.assert_close(merged(tokens).logits, wanted, atol=1e-4, rtol=1e-4)
    assert set(LINEARS) == {name.removeprefix("a.") for name in kept if name.startswith("a.")}


def test_a_carried_state_is_small_and_its_curve_the_same(model: Model, batches: Batches, tmp_path: Path) -> None:
    """Rounded, without moments: after the rate has risen again the run is where it would have been."""

    def end(trainer: Trainer) -> float:
        return sum(entry["kl"] for entry in trainer.history[-4:]) / 4

    whole = Trainer(recipe(steps=60), model, batches, CPU)
    whole.run(tmp_path / "whole", 5, 1e9, lambda entry: None)
    part = Trainer(recipe(steps=60), model, batches, CPU)
    part.run(tmp_path / "part", 5, 1e9, lambda entry: None, stop_at=25)
    exact, small = ((tmp_path / "part" / name).stat().st_size for name in (STATE, CARRIED))
    assert small < exact / 4
    (tmp_path / "part" / STATE).unlink()
    resumed = Trainer(recipe(steps=60), model, batches, CPU)
    assert resumed.load(tmp_path / "part") and resumed.begun == resumed.step == 25
    resumed.run(tmp_path / "part", 5, 1e9, lambda entry: None)
    assert resumed.history[:5] == whole.history[:5]
    assert resumed.history[5]["rate"] < whole.history[5]["rate"]
    first, last = whole.history[0]["kl"], end(whole)
    assert abs(resumed.history[5]["kl"] - whole.history[5]["kl"]) < 0.1 * (first - last), "nothing learnt is lost"
    assert abs(end(resumed) - last) < 0.05 * (first - last)


def test_a_run_stops_before_its_deadline(model: Model, batches: Batches, tmp_path: Path) -> None:
    trainer = Trainer(recipe(steps=100_000), model, batches, CPU)
    began = time.monotonic()
    trainer.run(tmp_path, 2, 1e9, lambda entry: None, deadline=began + 0.3)
    assert 0 < trainer.step < 100_000
    again = Trainer(recipe(steps=100_000), model, batches, CPU)
    assert again.load(tmp_path) and again.step == trainer.step and again.begun == 0, "the exact state goes first"


def test_another_rank_to_go_on_from_is_one_sentence(model: Model, batches: Batches) -> None:
    tensors = {n: p.detach() for n, p in Adapter(model, 3, 2.0, 0).named_parameters()}
    with pytest.raises(ConfigError, match="at train.rank=4: give the rank that it has"):
        Trainer(recipe(), model, batches, CPU, init=tensors)
