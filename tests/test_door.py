"""The library door: methods on a loaded model without the command line, counted rightly whoever shares the batch."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dynact
from dynact import Achieved, Cats, Cett, Fit, Griffin, Relu2, Teal
from harness.errors import ConfigError, UnsupportedError
from tests import tiny

TEXT = torch.arange(4 * 32).remainder(90).view(4, 32) + 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = tiny.make("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    return model


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens(2, 12)).logits


def test_importing_takes_nothing_along():
    code = "import sys, dynact; assert not {'torch', 'transformers', 'methods'} & set(sys.modules); dynact.Teal"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_method_is_to_be_had_by_its_class():
    assert {"Teal", "DejaVu", "KvSkip", "ReluStage2", "MoEfication", "attach", "achieved"} <= set(dir(dynact))
    with pytest.raises(AttributeError, match="no attribute 'Experts'"):
        _ = dynact.Experts
    with pytest.raises(ImportError):
        from dynact import NoSuchMethod  # noqa: F401


def test_a_method_acts_inside_the_block_only(model):
    before = logits(model)
    with dynact.attach(model, Teal(sparsity=0.5), calibration=TEXT):
        inside = logits(model)
    assert not torch.equal(inside, before)
    assert torch.equal(logits(model), before)
    with (
        pytest.raises(RuntimeError, match="mine"),
        dynact.attach(model, Teal(sparsity=0.5), calibration=TEXT),
    ):
        raise RuntimeError("mine")
    assert torch.equal(logits(model), before)
    assert not model._forward_pre_hooks


def test_achieved_is_near_what_was_asked_and_stays_to_be_read(model):
    with dynact.attach(model, Teal(sparsity=0.5), calibration=TEXT):
        with pytest.raises(ConfigError, match="nothing was counted"):
            dynact.achieved(model)
        with torch.no_grad():
            model(TEXT)
        inside = dynact.achieved(model)
    assert inside == dynact.achieved(model)
    assert inside.tokens == TEXT.numel()
    assert inside.model == pytest.approx(0.5, abs=0.05)
    assert set(inside.sites) == {"attn_in", "attn_out", "mlp_in", "mlp_hidden", "kv"} and inside.sites["kv"] == 0
    assert "of the block weights skipped" in str(inside)
    assert inside.phase("prefill").model == inside.model
    with pytest.raises(KeyError, match="decode"):
        inside.phase("decode")
    frame = inside.frame()
    assert set(frame["layer"].dropna()) == {0, 1, 2}


def test_the_numbers_are_the_runners(model):
    from harness.execution.attach import attached
    from harness.fitting.calibration import Calibration
    from harness.model.families import view_of
    from harness.model.step import Policy

    view, method = view_of(model), Teal(sparsity=0.4)
    state = method.fit(view, Calibration(view, TEXT.split(4)))
    with torch.no_grad(), attached(view, [(method, state)], Policy(), count=True) as ledger:
        ours = model(TEXT).logits
    skipped, total = (part.sum() for part in ledger.skipped_weights(("q", "k", "v", "o", "gate", "up", "down")))
    with torch.no_grad(), dynact.attach(model, method, calibration=TEXT):
        assert torch.equal(model(TEXT).logits, ours)
    assert dynact.achieved(model).model == (skipped / total).item()


def test_nested_methods_ask_the_innermost(model):
    with dynact.attach(model, [Relu2(sparsity=0.5), Cett(sparsity=0.8)], calibration=TEXT), torch.no_grad():
        model(TEXT)
    assert dynact.achieved(model).sites["mlp_hidden"] == pytest.approx(0.8, abs=0.05)


def test_a_fit_serves_again_for_another_sparsity_and_from_a_file(model, tmp_path):
    with dynact.attach(model, Teal(sparsity=0.5), calibration=TEXT) as fit:
        inside = logits(model)
    fit.save(tmp_path / "teal.safetensors")
    kept = Fit.load(tmp_path / "teal.safetensors")
    with dynact.attach(model, Teal(sparsity=0.5), calibration=kept):
        assert torch.equal(logits(model), inside)
    with dynact.attach(model, Teal(sparsity=0.25), calibration=fit), torch.no_grad():
        model(TEXT)
    assert dynact.achieved(model).model == pytest.approx(0.25, abs=0.05)
    assert dynact.fit(model, Teal(sparsity=0.9), TEXT).keys == fit.keys

    with pytest.raises(ConfigError, match="other options of teal: allocation"):
        with dynact.attach(model, Teal(sparsity=0.5, allocation="greedy"), calibration=fit):
            pass
    with pytest.raises(ConfigError, match="another model: family, kv_heads, weights differ"):
        with dynact.attach(tiny.make("opt"), Teal(sparsity=0.5), calibration=fit):
            pass
    with dynact.attach(model, [Teal(sparsity=0.2), Cats(sparsity=0.5)], calibration=TEXT) as nested:
        pass
    with pytest.raises(ConfigError, match="other options of cats: outside"):
        with dynact.attach(model, [Teal(sparsity=0.3), Cats(sparsity=0.5)], calibration=nested):
            pass
    with pytest.raises(ConfigError, match="holds no saved fit"):
        Fit.load(tmp_path / "nothing")


def generated(model, prompts, **options):
    """Prompts padded on the left into one batch; what was counted."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, **options)
    return dynact.achieved(model)


@pytest.mark.parametrize("method", [Teal(sparsity=0.5), Cats(sparsity=0.5), Griffin(sparsity=0.5)])
def test_neither_padding_nor_the_end_of_a_neighbour_counts(model, method):
    """Whoever shares a batch, the counts are the sum of what each sequence makes alone."""
    prompts = [[5, 9, 12, 33, 7, 20], [8, 4], [60, 61, 62]]
    # The second answer's third token ends sequences from now on, so that the batch ends at different times.
    with dynact.attach(model, method, calibration=TEXT) as fit:
        answer = model.generate(torch.tensor([prompts[1]]), do_sample=False, max_new_tokens=8, eos_token_id=[])
    model.generation_config.eos_token_id = answer[0, len(prompts[1]) + 2].item()
    alone: list[Achieved] = []
    for prompt in prompts:
        with dynact.attach(model, method, calibration=fit):
            alone.append(generated(model, [prompt]))
    with dynact.attach(model, method, calibration=fit):
        together = generated(model, prompts)
    assert len({one.tokens - len(p) for one, p in zip(alone, prompts, strict=True)}) > 1, "they end together"
    assert together.tokens == sum(one.tokens for one in alone)
    for name in ("model", "mlp", "attn"):
        weighted = sum(getattr(one, name) * one.tokens for one in alone) / together.tokens
        assert getattr(together, name) == pytest.approx(weighted, abs=1e-9)


def test_the_phase_is_the_methods_own_where_none_is_asked(model):
    with dynact.attach(model, Griffin(sparsity=0.5)), torch.no_grad():
        generated(model, [[5, 9, 12, 33]], eos_token_id=[])
    found = dynact.achieved(model)
    assert found.phase("prefill").model == 0.0
    assert found.phase("decode").sites["neurons"] == pytest.approx(0.5, abs=0.01)


class Words:
    """A tokenizer of one token a word."""

    def __call__(self, text, **_):
        return {"input_ids": [3 + len(word) for word in text.split()]}


def test_texts_are_tokenized(model):
    texts = ["a bb ccc dddd " * 20, "eeeee f " * 30]
    with dynact.attach(model, Teal(sparsity=0.5), calibration=texts, tokenizer=Words()), torch.no_grad():
        model(TEXT)
    assert 0.0 < dynact.achieved(model).model < 1.0


def test_a_tokenizer_that_lies_with_the_model_is_found(tmp_path, tokenizer):
    folder = tiny.save_with_tokenizer(tmp_path, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with dynact.attach(model, Teal(sparsity=0.5), calibration="Some words to learn from. " * 40), torch.no_grad():
        model(TEXT)
    assert 0.0 < dynact.achieved(model).model < 1.0


@pytest.mark.parametrize(
    ("ask", "error", "sentence"),
    [
        ({"methods": Teal(sparsity=0.5)}, ConfigError, "teal learns from text: give calibration="),
        ({"methods": Teal}, ConfigError, r"is not a method: write Teal\(...\)"),
        ({"methods": ["teal"]}, ConfigError, "'teal' is not a method"),
        ({"methods": Teal(sparsity=0.5), "calibration": ["text"]}, ConfigError, "give tokenizer="),
        ({"methods": Teal(sparsity=0.5), "calibration": []}, ConfigError, "calibration is a text"),
        ({"methods": Teal(sparsity=0.5), "calibration": torch.ones(4)}, ConfigError, "token windows are int64"),
        ({"methods": Griffin(sparsity=0.5), "phase": "all"}, UnsupportedError, "griffin exists only in phase decode"),
        ({"methods": Griffin(sparsity=0.5), "phase": "both"}, ConfigError, "phase must be auto, all or decode"),
        ({"methods": Griffin(sparsity=0.5), "dense_prefix": -1}, ConfigError, "dense_prefix must be a whole number"),
    ],
)
def test_bad_input_is_one_sentence(model, ask, error, sentence):
    with pytest.raises(error, match=sentence):
        with dynact.attach(model, **ask):
            pass


def test_what_is_no_model_or_trains_is_one_sentence(model):
    with pytest.raises(ConfigError, match="a transformers model is needed, not str"):
        with dynact.attach("a/path", Teal(sparsity=0.5)):
            pass
    with pytest.raises(ConfigError, match=r"call model.eval\(\) first"):
        with dynact.attach(model.train(), Teal(sparsity=0.5)):
            pass
    model.eval()
    with dynact.attach(model, Teal(sparsity=0.5), calibration=TEXT):
        with pytest.raises(ConfigError, match="attached to this model already"):
            with dynact.attach(model, Cats(sparsity=0.5), calibration=TEXT):
                pass


def test_nothing_holds_the_model_afterwards():
    model = tiny.make("llama")
    with dynact.attach(model, Teal(sparsity=0.5), calibration=TEXT), torch.no_grad():
        model(TEXT)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_readmes_example_runs(tmp_path, tokenizer, capsys):
    """The first Python block of README.md, given a model, its tokenizer and some texts."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    assert "dynact.attach" in code and len([line for line in code.splitlines() if line.strip()]) <= 4
    model = AutoModelForCausalLM.from_pretrained(tiny.save_with_tokenizer(tmp_path, tokenizer)).eval()
    exec(code, {"model": model, "tokenizer": tokenizer, "texts": ["Some words to learn from. " * 40]})
    assert re.search(r"0\.\d+ of the block weights skipped .* over \d+ tokens", capsys.readouterr().out)


def test_a_method_that_makes_up_for_others_is_fitted_last_and_never_alone(model):
    with pytest.raises(ConfigError, match="spon makes up for what another method drops"):
        dynact.fit(model, dynact.Spon(), TEXT)
    with dynact.attach(model, [dynact.Spon(epochs=1), Teal(sparsity=0.5)], calibration=TEXT) as fit, torch.no_grad():
        model(TEXT)
    assert [key["method"] for key in fit.keys] == ["teal", "spon"]
    assert dynact.achieved(model).model == pytest.approx(0.5, abs=0.05)
