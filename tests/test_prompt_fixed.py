"""GRIFFIN and TDA: the neurons of an answer are fixed by its prompt, in scoring and in generation alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.execution.attach import attached
from harness.execution.masked import Installation
from harness.model.step import Policy
from methods.griffin import Griffin, flocking
from methods.tda import Tda, prompt_norms
from tests import tiny

DECODE = Policy("decode")
METHODS = {"griffin": Griffin, "tda": Tda}


def fitted(name: str, view, sparsity: float = 0.5):
    method = METHODS[name](sparsity)
    return method, method.fit(view, tiny.calibration(view)) if method.needs == "calibration" else {}


def masks_of(monkeypatch, run) -> dict[int, torch.Tensor]:
    """Layer -> the neurons [batch, neurons] that the decode tokens of the last forward pass kept."""
    found: dict[int, torch.Tensor] = {}
    decide = Installation._decide_rows

    def spy(self, site, layer, x):
        decide(self, site, layer, x)
        if (site, layer) in self.kept and bool(self.step.decode.any()):
            found[layer] = self.kept[site, layer][:, -1].clone()

    with monkeypatch.context() as patch:
        patch.setattr(Installation, "_decide_rows", spy)
        with torch.no_grad():
            run()
    return found


def two_stage(view, ids, prompt: int, valid=None):
    """One pass: the first `prompt` tokens are the prompt."""
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    decode = torch.zeros_like(valid)
    decode[:, prompt:] = True
    with view.tracker.hint(valid, decode & valid):
        return view.model(ids, use_cache=False).logits


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 5), st.floats(0.05, 50.0), st.integers(0, 1000))
def test_griffin_ignores_the_size_of_a_token_and_tda_does_not(token, factor, seed):
    z = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(seed))
    prompt = torch.ones(1, 6, dtype=torch.bool)
    scaled = z.clone()
    scaled[:, token] *= factor
    torch.testing.assert_close(flocking(scaled, prompt), flocking(z, prompt), rtol=1e-4, atol=1e-6)
    moved = (prompt_norms(scaled, prompt) - prompt_norms(z, prompt)).abs().max()
    assert moved > 1e-3 or abs(factor - 1) < 0.1


def test_statistics_are_what_the_papers_say():
    z = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [9.0, 9.0]]])
    prompt = torch.tensor([[True, True, False]])  # the third is padding, or comes later
    rows = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    torch.testing.assert_close(flocking(z, prompt), rows.square().sum(0).sqrt()[None])
    torch.testing.assert_close(prompt_norms(z, prompt), torch.tensor([[3.0, 20.0**0.5]]) / 2**0.5)


@pytest.mark.parametrize("name", METHODS)
def test_generation_has_the_masks_of_scoring(name, monkeypatch):
    view = tiny.view("llama")
    method, state = fitted(name, view)
    ids = tiny.tokens(2, 24)
    with attached(view, [(method, state)], DECODE):
        scoring = masks_of(monkeypatch, lambda: two_stage(view, ids, 16))
        generated = masks_of(
            monkeypatch,
            lambda: view.model.generate(
                ids[:, :16], attention_mask=torch.ones(2, 16), max_new_tokens=4, do_sample=False, pad_token_id=0
            ),
        )
    assert scoring.keys() == generated.keys() == set(range(view.n_layers))
    for layer, keep in scoring.items():
        assert torch.equal(keep, generated[layer]) and 0 < keep.sum() < keep.numel()


@pytest.mark.parametrize("name", METHODS)
def test_left_padding_has_no_say(name, monkeypatch):
    view = tiny.view("llama")
    method, state = fitted(name, view)
    ids = tiny.tokens(1, 16)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(21) >= 5).long()[None]

    def generate(tokens, attention_mask):
        view.model.generate(tokens, attention_mask=attention_mask, max_new_tokens=2, do_sample=False, pad_token_id=0)

    with attached(view, [(method, state)], DECODE):
        alone = masks_of(monkeypatch, lambda: generate(ids, torch.ones_like(ids)))
        beside = masks_of(monkeypatch, lambda: generate(padded, mask))
    assert all(torch.equal(alone[layer], beside[layer]) for layer in alone)


@pytest.mark.parametrize("name", METHODS)
def test_the_prompt_stays_dense_and_decides(name):
    view = tiny.view("llama")
    method, state = fitted(name, view)
    ids = tiny.tokens(1, 24)
    other = ids.clone()
    other[:, :12] = tiny.tokens(1, 12, seed=7)
    with torch.no_grad():
        dense = view.model(ids, use_cache=False).logits
        with attached(view, [(method, state)], DECODE):
            sparse = two_stage(view, ids, 16)
    assert torch.equal(sparse[:, :16], dense[:, :16])
    assert not torch.allclose(sparse[:, 16:], dense[:, 16:], atol=1e-3)


def test_another_prompt_gives_other_neurons(monkeypatch):
    view = tiny.view("llama")
    method, state = fitted("tda", view)
    with attached(view, [(method, state)], DECODE):
        found = [masks_of(monkeypatch, lambda s=s: two_stage(view, tiny.tokens(1, 24, seed=s), 16)) for s in (1, 2)]
    counts = [[int(keep.sum()) for keep in masks.values()] for masks in found]
    assert counts[0] != counts[1], "the same number of neurons for two prompts"
    assert len(set(counts[0])) > 1, "the same number of neurons in every layer"


@pytest.mark.parametrize("name", METHODS)
def test_without_a_prompt_nothing_is_skipped(name):
    view = tiny.view("llama")
    method, state = fitted(name, view)
    ids = tiny.tokens(2, 12)
    with torch.no_grad():
        dense = view.model(ids, use_cache=False).logits
        with attached(view, [(method, state)], DECODE):
            assert torch.equal(two_stage(view, ids, 0), dense)
            two_stage(view, ids, 8)
            assert torch.equal(two_stage(view, ids, 0), dense), "the last batch's masks were kept"


@pytest.mark.parametrize("name", METHODS)
def test_scoring_tasks_are_not_scored_dense(name, tokenizer):
    """Log-likelihood requests as lm-eval makes them: other numbers than dense, the same in a batch as alone."""
    from lm_eval.api.instance import Instance

    from harness.model.lm import HarnessLM

    view = tiny.view("llama", vocabulary=len(tokenizer))
    method, state = fitted(name, view)
    pairs = [("The cat sat on the mat and looked at", " the dog"), ("Water boils at a hundred", " degrees Celsius")]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]

    def scores(batch_size: int) -> list[float]:
        lm = HarnessLM(view, tokenizer, batch_size)
        return [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    dense = scores(2)
    with attached(view, [(method, state)], DECODE):
        together, alone = scores(2), scores(1)
    assert all(abs(a - b) > 1e-3 for a, b in zip(dense, together, strict=True))
    assert together == pytest.approx(alone, abs=1e-3)


def test_calibration_prompts_lose_the_requested_share_on_average():
    view = tiny.view("llama")
    method, state = fitted("tda", view, sparsity=0.3)
    plan, calibration = method.plan(view, state), tiny.calibration(view)
    hidden = calibration.activations("mlp_hidden")["mlp_hidden"]
    for layer in range(view.n_layers):
        z = hidden[layer].view(8, 64, -1)
        dropped = prompt_norms(z, torch.ones(8, 64, dtype=torch.bool)) <= plan.cuts[layer]
        assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.01)
        assert len(dropped.sum(-1).unique()) > 1, "the number must vary by prompt"
