"""The training machinery on a tiny random LLaMA: equal to the Hugging Face model, deterministic, resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from harness.errors import ConfigError
from harness.training.adapter import Adapter, cut
from harness.training.card import read_whole
from harness.training.data import Batches
from harness.training.decode_kernel import decode_attention
from harness.training.evaluate import evaluate
from harness.training.experts import efficiency_weight, first_router
from harness.training.generate import starts, write
from harness.training.llama import Model, largest, make_block, norm, rotary
from harness.training.loop import Recipe, Trainer
from harness.training.losses import head_divergence
from harness.training.sparsity import progressive_weight, square_gains, steer_threshold, threshold_target
from tests.forks import ROOT, Forks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_theta=5000.0,
        initializer_range=0.3,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(llama: LlamaForCausalLM) -> Model:
    return Model.of(llama.config.to_dict(), llama.state_dict())


@pytest.fixture(scope="module")
def batches() -> Batches:
    generator = torch.Generator().manual_seed(1)
    own, real = (torch.randint(97, (4000,), generator=generator, dtype=torch.int32) for _ in range(2))
    return Batches(own, real, real_share=0.25, batch=4, length=24, seed=3)


def recipe(**changes: object) -> Recipe:
    small = Recipe("tiny", "relu", steps=12, batch=4, length=24, rank=4, warmup=2)
    return replace(small, **changes)


def logits_of(model: Model, tokens: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    block = make_block(model.shape, activation, activation)
    cos, sin = rotary(model.shape, torch.arange(tokens.shape[1]))
    x = model.embedding[tokens]
    for i in range(model.shape.layers):
        w = {n: s[i] for n, s in (model.linears | model.norms).items()}
        x = block(x, w, cos, sin, torch.zeros(()), torch.ones(()))[0]
    return norm(x, model.final_norm, model.shape.epsilon) @ model.embedding.T


def test_block_equals_the_hugging_face_model(llama: LlamaForCausalLM, model: Model) -> None:
    tokens = torch.randint(97, (3, 20))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, tokens), llama(tokens).logits, atol=2e-4, rtol=1e-4)


def test_head_divergence_equals_autograd() -> None:
    torch.manual_seed(2)
    student = torch.randn(10, 8, dtype=torch.double, requires_grad=True)
    teacher, head = torch.randn(10, 8, dtype=torch.double), torch.randn(30, 8, dtype=torch.double)
    value = head_divergence(student, teacher, head, chunk=4)
    (slope,) = torch.autograd.grad(value * 3, student)
    plain = torch.nn.functional.kl_div(
        (student @ head.T).log_softmax(-1),
        (teacher @ head.T).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    (expected,) = torch.autograd.grad(plain * 3, student)
    torch.testing.assert_close(value.double(), plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(slope, expected, atol=1e-6, rtol=1e-5)


def test_written_text_is_greedy_at_low_temperature(llama: LlamaForCausalLM, model: Model) -> None:
    real = torch.randint(97, (500,))
    tokens, given = starts(real, 3, 16, 2, 5, 0.4, torch.Generator().manual_seed(0))
    begun = tokens.clone()
    write(model, tokens, given, torch.full((3,), 1e-4), seed=0, kernel=False)
    for row, count in zip(range(3), given.tolist(), strict=True):
        assert torch.equal(tokens[row, :count], begun[row, :count])
        with torch.no_grad():
            wanted = llama(tokens[row : row + 1]).logits.argmax(-1)[0]
        assert torch.equal(tokens[row, count:], wanted[count - 1 : -1])


def test_sampling_follows_the_distribution() -> None:
    from harness.training.generate import sample

    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20000, 3)
    noise = torch.empty(20000, 3).exponential_(generator=generator)
    seen = sample(logits, torch.full((20000,), 2.0), noise).bincount(minlength=3) / 20000
    torch.testing.assert_close(seen, torch.tensor([0.0, 0.5, 1.0]).softmax(0), atol=0.015, rtol=0)


def test_decode_attention_is_the_last_row_of_causal_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)
    got = decode_attention(q, k, v, 9, kernel=False)
    score = torch.einsum("bkgd,bkld->bkgl", q.view(2, 2, 3, 16), k[:, :, :9]) / 4
    wanted = torch.einsum("bkgl,bkld->bkgd", score.softmax(-1), v[:, :, :9]).reshape(2, 6, 16)
    torch.testing.assert_close(got, wanted)


KERNEL_CHECK = """
import torch
from harness.training.decode_kernel import decode_attention
torch.manual_seed(0)
q, k, v = torch.randn(3, 6, 64), torch.randn(3, 2, 150, 64), torch.randn(3, 2, 150, 64)
for length in (1, 63, 64, 65, 150):
    torch.testing.assert_close(
        decode_attention(q, k, v, length, True), decode_attention(q, k, v, length, False), atol=1e-4, rtol=1e-4
    )
"""


def test_decode_kernel_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", KERNEL_CHECK], check=True, env=environment)


def test_an_untrained_adapter_changes_nothing(model: Model, batches: Batches) -> None:
    merged = Adapter(model, 4, 2.0, 0)(model.linears, torch.float32)
    assert all(torch.equal(merged[name], model.linears[name]) for name in merged)
    control = Trainer(recipe(activation="silu"), model, batches, CPU)
    assert float(control.advance()["kl"]) == pytest.approx(0, abs=1e-6)


def test_training_brings_the_student_closer(model: Model, batches: Batches) -> None:
    trainer = Trainer(recipe(steps=60, warmup=5), model, batches, CPU)
    first = float(trainer.advance()["kl"])
    while trainer.step < 60:
        last = float(trainer.advance()["kl"])
    assert last < 0.8 * first


def test_resumed_run_has_the_same_curve(model: Model, batches: Batches, tmp_path: Path) -> None:
    changed = recipe(l1_ends=[0.2, 0.6], l1_peaks=[0.0, 0.1], zeros=0.8, zeros_rate=0.5)
    whole = Trainer(changed, model, batches, CPU)
    whole.run(tmp_path / "whole", 2, 0, lambda entry: None)
    part = Trainer(changed, model, batches, CPU)
    part.run(tmp_path / "part", 2, 0, lambda entry: None, stop_at=8)
    resumed = Trainer(changed, model, batches, CPU)
    assert resumed.load(tmp_path / "part")
    assert resumed.step == 8
    resumed.run(tmp_path / "part", 2, 0, lambda entry: None)
    assert resumed.history == whole.history
    for name, value in whole.adapter_tensors().items():
        assert torch.equal(value, resumed.adapter_tensors()[name])


def test_threshold_reaches_the_wanted_zeros(model: Model, batches: Batches) -> None:
    trainer = Trainer(recipe(steps=80, zeros=0.85, zeros_ramp=0.3, zeros_rate=0.5), model, batches, CPU)
    while trainer.step < 80:
        seen = trainer.advance()
    assert float(seen["zeros"]) == pytest.approx(0.85, abs=0.04)
    assert float(seen["threshold"]) > 0


def test_gains_start_relu2_nearer(model: Model, batches: Batches) -> None:
    plain = Trainer(recipe(activation="relu2"), model, batches, CPU).advance()["kl"]
    fitted = Trainer(recipe(activation="relu2", fit_gains=True), model, batches, CPU).advance()["kl"]
    assert fitted < plain


def test_experts_train_softly_then_select(model: Model, batches: Batches) -> None:
    experts = torch.arange(64).div(8, rounding_mode="floor").expand(2, 64)
    changed = recipe(activation="silu", steps=40, expert_size=8, efficiency=4.0, budget=0.2, router_rate=10.0)
    trainer = Trainer(changed, model, batches, CPU, experts=experts)
    soft = [trainer.advance() for _ in range(20)]
    assert all(float(entry["zeros"]) < 0.01 for entry in soft)
    assert float(soft[0]["chosen"]) == pytest.approx(0.5, abs=0.15)
    assert float(soft[-1]["chosen"]) < float(soft[0]["chosen"]) - 0.04
    frozen = trainer.router.detach().clone()
    hard = [trainer.advance() for _ in range(2)]
    assert all(float(entry["zeros"]) == pytest.approx(1 - float(entry["chosen"]), abs=0.01) for entry in hard)
    assert torch.equal(frozen, trainer.router)


def test_separability_pushes_scores_apart(model: Model, batches: Batches) -> None:
    experts = torch.arange(64).div(8, rounding_mode="floor").expand(2, 64)
    ends = []
    for weight in (0.0, 0.5):
        changed = recipe(
            activation="silu", steps=20, expert_size=8, separability=weight, hard_from=1.0, router_rate=10.0
        )
        trainer = Trainer(changed, model, batches, CPU, experts=experts)
        ends.append([float(trainer.advance()["separability"]) for _ in range(20)][-1])
    assert ends[1] < 0.97 * ends[0]


def test_first_router_finds_the_larger_half() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 12, generator=generator)
    expert_of = torch.arange(16) % 4
    way = torch.randn(4, 12, generator=generator)
    hidden = (inputs @ way.T).exp()[:, expert_of]  # the experts' outputs follow a linear score
    router = first_router(inputs, hidden, torch.ones(5, 16), expert_of)
    score = inputs @ way.T
    wanted = score > score.median(dim=1, keepdim=True).values
    assert ((inputs @ router.T > 0) == wanted).float().mean() > 0.8


def test_efficiency_rests_at_the_budget() -> None:
    weights = [float(efficiency_weight(2.0, torch.tensor(share), 0.5)) for share in (0.4, 0.5, 0.525, 0.9)]
    assert weights == pytest.approx([0.0, 0.0, 1.0, 2.0], abs=1e-5)


def test_cut_factors_are_the_best_of_their_rank() -> None:
    torch.manual_seed(0)
    tensors = {"a.q": torch.randn(2, 6, 10), "b.q": torch.randn(2, 9, 6), "scale.q": torch.zeros(2, 9)}
    short = cut(tensors, 3)
    u, values, v = torch.linalg.svd(tensors["b.q"] @ tensors["a.q"], full_matrices=False)
    best = u[..., :3] * values[:, None, :3] @ v[:, :3]
    torch.testing.assert_close(short["b.q"] @ short["a.q"], best, atol=1e-5, rtol=1e-4)
    assert short["a.q"].shape == (2, 3, 10) and short["scale.q"] is tensors["scale.q"]
    assert cut(tensors, 0) == tensors


def test_progressive_weight_follows_the_sine_stages() -> None:
    ends, peaks = [0.1, 0.5, 0.9], [0.01, 0.1, 0.3]
    assert progressive_weight(0.05, ends, peaks) == 0.01
    assert progressive_weight(0.3, ends, peaks) == pytest.approx(0.055)
    assert progressive_weight(0.5, ends, peaks) == pytest.approx(0.1)
    assert progressive_weight(1.0, ends, peaks) == 0.3
    values = [progressive_weight(i / 100, ends, peaks) for i in range(101)]
    assert values == sorted(values)
    assert progressive_weight(0.5, [], []) == 0


def test_threshold_rules() -> None:
    assert threshold_target(0.2, 0.8, ramp=0.4, freeze=0.8) == pytest.approx(0.4)
    assert threshold_target(0.6, 0.8, ramp=0.4, freeze=0.8) == 0.8
    assert threshold_target(0.8, 0.8, ramp=0.4, freeze=0.8) is None
    assert threshold_target(0.5, 0.0, ramp=0.4, freeze=0.8) is None
    assert float(steer_threshold(torch.tensor(0.0), torch.tensor(0.9), 0.5, 0.1)) == 0
    assert float(steer_threshold(torch.tensor(0.1), torch.tensor(0.4), 0.5, 0.1)) == pytest.approx(0.11)


def test_gains_are_least_squares() -> None:
    torch.manual_seed(0)
    new = torch.rand(50, 3)
    old = new * torch.tensor([0.5, 1.5, 9.0])
    got = square_gains(new.square().sum(0), (new * old).sum(0))
    torch.testing.assert_close(got, torch.tensor([0.5, 1.5, 2.0]))


def test_oracle_keeps_the_largest() -> None:
    hidden = torch.tensor([[1.0, -4.0, 0.5, 3.0]])
    assert largest(hidden, 2).tolist() == [[0.0, -4.0, 0.0, 3.0]]


def test_evaluation_matches_the_hugging_face_loss(llama: LlamaForCausalLM, model: Model) -> None:
    windows = torch.randint(97, (5, 16), dtype=torch.int32)
    got = evaluate(model, model, "silu", torch.zeros(2), windows, batch=2)
    with torch.no_grad():
        losses = [llama(w[None].long(), labels=w[None].long()).loss for w in windows]
    assert got["nll"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
    assert (got["kl"], got["agreement"], got["zeros"], got["tokens"]) == (
        pytest.approx(0, abs=1e-9),
        1,
        0,
        75,
    )
    half = evaluate(model, model, "silu", torch.zeros(2), windows, drop=0.5)
    assert half["zeros_by_layer"] == [0.5, 0.5]
    assert half["kl"] > 0


def test_batches_depend_on_seed_and_step_alone(batches: Batches) -> None:
    assert torch.equal(batches.at(5), batches.at(5))
    assert not torch.equal(batches.at(5), batches.at(6))
    with pytest.raises(ConfigError):
        Batches(torch.zeros(5), torch.zeros(5), 0.1, 2, 8, 0)


@pytest.fixture(scope="module")
def folders(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("training")
    llama.save_pretrained(root / "model")
    (root / "out" / "text").mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    real = torch.randint(97, (3000,), generator=generator, dtype=torch.int32)
    separator = torch.tensor([7], dtype=torch.int32)
    save_file({"tokens": real, "separator": separator}, root / "out" / "text" / "real.safetensors")
    save_file({"tokens": real.view(-1, 50).contiguous()}, root / "out" / "text" / "windows.safetensors")
    return root / "model", root / "out"


def command(folders: tuple[Path, Path], *changes: str) -> list[str]:
    model, out = folders
    small = ["text.tokens=4000", "text.batch=20", "text.length=100", "text.heldout=500", "log_every=5"]
    return [
        str(ROOT / "train.py"),
        "train=smoke",
        "device=cpu",
        f"model.path={model}",
        f"folder={out}",
        "train.rank=4",
        "evaluate.drops=[0.5]",
        *small,
        *changes,
    ]


def environment(folders: tuple[Path, Path]) -> dict[str, str]:
    cache = str(folders[1] / "cache")  # nothing may be fetched
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DYNACT_CACHE": cache}


def test_fifty_steps_killed_and_resumed(folders: tuple[Path, Path], forks: Forks) -> None:
    """The smoke run through the app: text, training killed by SIGKILL, resumed to the same curve, evaluated."""
    env = environment(folders)
    whole = [sys.executable, *command(folders, "train.name=whole", "save_every_s=0")]
    subprocess.run(whole, env=env, check=True, capture_output=True)
    train = command(folders, "train.name=killed", "save_every_s=0", "do=[train]")
    victim = forks.start(train, ROOT, env)
    state = folders[1] / "model-killed" / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    assert not (folders[1] / "model-killed" / "adapter").exists(), "the run ended before it could be killed"
    resumed = forks.start(train, ROOT, env)
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert "going on from step" in out
    whole, killed = (
        json.loads((folders[1] / name / "adapter" / "adapter.json").read_text())
        for name in ("model-whole", "model-killed")
    )
    assert len(whole["history"]) == 10
    assert whole["history"] == killed["history"]
    assert whole["sha256"] == killed["sha256"]
    adapter = folders[1] / "model-whole" / "adapter"
    assert read_whole(adapter)["evaluation"]["natural"]["zeros"] > 0.3
    assert "# model-whole" in (adapter / "README.md").read_text()


@pytest.mark.parametrize("change", ["do=[dance]", "train.wings=2", "train.rank=four"])
def test_bad_input_ends_with_one_sentence(folders: tuple[Path, Path], forks: Forks, change: str) -> None:
    process = forks.start(command(folders, change), ROOT, environment(folders))
    _, err = process.communicate()
    assert process.returncode == 2
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1


def test_task_scores_are_paired_by_item_and_leave_smoke_runs_out(tmp_path, monkeypatch):
    from harness.training import scores

    models = {"base": "smollm2-135m", "student": "smollm2-135m-relu"}
    facts = {"probe": "quality", "method": "dense", "device": "cpu", "dtype": "float32"}
    rows = [
        facts | {"cell_id": cell, "model": model, "task": task, "limited": task == "copa"}
        for cell, model in models.items()
        for task in ("piqa", "copa")
    ]
    right = {"base": [1, 1, 0, 1], "student": [1, 0, 0, 0, 1]}  # the last item is the student's alone
    samples = [
        {"cell_id": cell, "task": task, "item": f"{task}/{item}", "kind": "accuracy", "value": value}
        for cell, values in right.items()
        for task in ("piqa", "copa")
        for item, value in enumerate(values)
    ]
    monkeypatch.setattr(scores, "read_rows", lambda store: (pd.DataFrame(rows), {}))
    monkeypatch.setattr(scores, "read_samples", lambda root: pd.DataFrame(samples))
    found = scores.scores(tmp_path, "smollm2-135m", "smollm2-135m-relu")
    assert list(found["scores"]) == ["piqa"]
    line = found["scores"]["piqa"]
    assert (line["items"], line["base"], line["score"], line["difference"]) == (4, 0.75, 0.25, -0.5)
    assert line["stderr"] == pytest.approx(np.std([0, -1, 0, -1], ddof=1) / 2)
    with pytest.raises(ConfigError, match="no whole dense cell of smollm2-135m-drelu"):
        scores.scores(tmp_path, "smollm2-135m", "smollm2-135m-drelu")
