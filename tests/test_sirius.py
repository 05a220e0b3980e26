"""Sirius: who gives each token, what lies in the cache afterwards, and what all of it reads."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache, StoppingCriteria, StoppingCriteriaList

from harness.errors import ConfigError, UnsupportedError
from harness.execution.attach import attached
from harness.execution.correction import accepted
from harness.model.step import Policy
from harness.run.config import check
from harness.run.nest import incomplete
from harness.run.overrides import composed
from harness.run.scope import to_native
from methods.griffin import Griffin
from methods.meangate import MeanGate
from methods.random import Random
from methods.sirius import Sirius
from methods.teal import Teal
from tests import tiny

DECODE = Policy("decode")
IDS = tiny.tokens(2, 24)


def wide_view():
    view = tiny.view("llama")
    view.model.double()
    return view


def teal(view, sparsity: float = 0.6):
    method = Teal(sparsity)
    return method, method.fit(view, tiny.calibration(view))


@torch.no_grad()
def answers(view, fitted, tokens: int = 12, mask: torch.Tensor | None = None, count: bool = False):
    """What greedy generation adds to IDS, and the ledger."""
    facts = {"attention_mask": torch.ones_like(IDS) if mask is None else mask, "pad_token_id": 0, "do_sample": False}
    with attached(view, fitted, DECODE, count=count) as ledger:
        # min_new_tokens would be a processor of logits; the random models end by length
        out = view.model.generate(
            IDS, max_new_tokens=tokens, eos_token_id=None, custom_generate=view.generator, **facts
        )
    return out[:, IDS.shape[1] :], ledger


def test_drafts_pass_up_to_the_first_unlikely_one():
    """Drafts 1, 2, 3 after a settled token; the dense model gives them .5, .05 and .9."""
    chances = torch.full((1, 4, 5), 0.01)
    chances[0, 0, 1], chances[0, 1, 2], chances[0, 2, 3] = 0.5, 0.05, 0.9
    chances[..., 0] += 1 - chances.sum(-1)
    drafts = torch.tensor([[4, 1, 2, 3]])
    assert accepted(chances.log(), drafts, 0.1) == 1
    assert accepted(chances.log(), drafts, 0.01) == 3
    assert accepted(chances.log(), drafts, 0.6) == 0


def test_where_every_draft_is_refused_the_answer_is_the_dense_models():
    """Each token is the dense model's, on keys and values that it wrote itself."""
    view = wide_view()
    dense, _ = answers(view, [])
    sparse, _ = answers(view, [teal(view)])
    assert not torch.equal(sparse, dense)
    refused, _ = answers(view, [(Sirius(0.6, kernel_size=4, threshold=1.0), {}), teal(view)])
    assert torch.equal(refused, dense)


def test_drafts_of_a_model_that_drops_nothing_are_never_wrong():
    view = wide_view()
    assert torch.equal(answers(view, [(Sirius(0.5, kernel_size=5), {})])[0], answers(view, [])[0])


class EndsAfter(StoppingCriteria):
    """Ends an answer of so many tokens if it begins with `first`."""

    def __init__(self, first: int, prompt: int, tokens: int) -> None:
        self.first, self.prompt, self.tokens = first, prompt, tokens

    def __call__(self, input_ids, scores, **kwargs):
        answers = input_ids[:, self.prompt :]
        return (answers[:, 0] == self.first) & (answers.shape[1] >= self.tokens)


@pytest.mark.parametrize("inner", ["teal", "griffin"])  # fixed thresholds; neurons of each sequence's own prompt
@pytest.mark.parametrize("period", [3, 4, 7])
@torch.no_grad()
def test_an_answer_does_not_depend_on_who_shares_the_batch(inner, period):
    """Sequences padded on the left, which keep different numbers of drafts and end at different times."""
    view = wide_view()
    fitted = [
        (Sirius(0.6, kernel_size=period, threshold=0.006), {}),
        teal(view) if inner == "teal" else (Griffin(0.6), {}),
    ]
    ids, padding = tiny.tokens(4, 24), [0, 9, 3, 14]
    mask = (torch.arange(24) >= torch.tensor(padding)[:, None]).long()
    first = int(view.model(ids[2:3, 3:]).logits[0, -1].argmax())

    def generated(rows: slice, cut: int):
        with attached(view, fitted, DECODE, count=True) as ledger:
            out = view.model.generate(
                ids[rows, cut:], attention_mask=mask[rows, cut:], max_new_tokens=30, do_sample=False, pad_token_id=0,
                eos_token_id=None, custom_generate=view.generator,
                stopping_criteria=StoppingCriteriaList([EndsAfter(first, 24 - cut, 9)]),
            )  # fmt: skip
        return out[:, 24 - cut :], ledger

    together, ledger = generated(slice(0, 4), 0)
    alone = [generated(slice(row, row + 1), padding[row]) for row in range(4)]
    for row, (answer, _) in enumerate(alone):
        assert torch.equal(together[row], torch.nn.functional.pad(answer[0], (0, together.shape[1] - answer.shape[1])))
    assert {answer.shape[1] for answer, _ in alone} == {9, 30}
    assert len({own.wasted for _, own in alone}) > 2, "all keep as many: nothing is moved"
    assert ledger.wasted == sum(own.wasted for _, own in alone)
    names = tuple(view.projection_names())
    for found, parts in zip(
        ledger.skipped_weights(names), zip(*(o.skipped_weights(names) for _, o in alone)), strict=True
    ):
        torch.testing.assert_close(found, torch.stack(parts).sum(0))


@pytest.mark.parametrize(("threshold", "read"), [(0.0, (3 * 0.5 + 1) / 4), (1.0, 3 * 0.5 + 1)])
def test_dense_steps_and_refused_drafts_are_charged(threshold, read):
    """Periods of 3 drafts at half of the weights and a dense step: four tokens for it, or one if all are refused.

    17 tokens: the first is the prompt's, the others come in periods.
    """
    view = wide_view()
    fitted = [(Sirius(0.5, kernel_size=4, threshold=threshold), {}), (Random(0.5), {})]
    _, ledger = answers(view, fitted, tokens=17, count=True)
    skipped, total = ledger.skipped_weights(tuple(view.projection_names()))
    assert total[1] == 2 * 16 * view.block_weights * view.n_layers
    assert 1 - (skipped[1] / total[1]).item() == pytest.approx(read, abs=0.01)


def test_a_stop_in_the_middle_of_a_period_wastes_the_rest_of_it():
    view = wide_view()
    fitted = [(Sirius(0.5, kernel_size=4, threshold=0.0), {}), (Random(0.5), {})]
    _, ledger = answers(view, fitted, tokens=3, count=True)
    assert ledger.tokens[1] == 2 * 4 and ledger.wasted == 2 * 2


@torch.no_grad()
def test_a_period_leaves_dense_keys_and_values_in_the_cache():
    """Drafted ones lie there meanwhile."""
    view = wide_view()
    fitted = [(Sirius(0.6, kernel_size=4), {}), teal(view)]
    dense = view.model(IDS, use_cache=True).past_key_values
    with attached(view, fitted, DECODE):
        cache = view.model(IDS[:, :16], use_cache=True).past_key_values
        for at in range(16, 20):
            last = view.model(IDS[:, at : at + 1], past_key_values=cache, use_cache=True).logits
            own = [layer.keys[:, :, 16:] for layer in cache.layers]
            theirs = [layer.keys[:, :, 16 : at + 1] for layer in dense.layers]
            same = all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(own, theirs, strict=True))
            assert same == (at == 19)
    torch.testing.assert_close(last[:, 0], view.model(IDS).logits[:, 19])


@torch.no_grad()
def test_scored_text_is_dense_at_the_end_of_each_period_and_before_it_drafted():
    view = wide_view()
    method, state = teal(view)
    decode = torch.zeros_like(IDS, dtype=torch.bool)
    decode[:, 8:] = True

    def scored(*fitted, count=False):
        with attached(view, fitted, DECODE, count=count) as ledger:
            with view.tracker.hint(torch.ones_like(decode), decode):
                return view.model(IDS, use_cache=False).logits, ledger

    dense, (inside, _), (found, ledger) = (
        view.model(IDS).logits,
        scored((method, state)),
        scored((Sirius(0.6, kernel_size=4), {}), (method, state), count=True),
    )
    torch.testing.assert_close(found[:, :8], dense[:, :8])
    torch.testing.assert_close(found[:, 11::4], dense[:, 11::4])
    torch.testing.assert_close(found[:, 8:11], inside[:, 8:11])  # before the first correction all is as inside
    assert not torch.allclose(found[:, 12], inside[:, 12]) and not torch.allclose(found[:, 12], dense[:, 12])
    alone = scored((method, state), count=True)[1]
    part, whole = (one.skipped_weights(tuple(view.projection_names())) for one in (ledger, alone))
    assert part[1][1] == whole[1][1], "the dense pass that makes the keys is not counted twice"
    assert (part[0][1] / whole[0][1]).item() == pytest.approx(3 / 4, abs=0.03)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2"])
@torch.no_grad()
def test_scoring_is_stepping_on_every_family_that_it_is_defined_for(family):
    view = tiny.view(family)
    view.model.double()
    outer, inner = Sirius(0.5, kernel_size=3), Random(0.5)
    assert outer.refusal(view) is None
    decode = torch.zeros_like(IDS, dtype=torch.bool)
    decode[:, 10:] = True
    with attached(view, [(outer, {}), (inner, {})], DECODE):
        with view.tracker.hint(torch.ones_like(decode), decode):
            whole = view.model(IDS, use_cache=False).logits
        out = view.model(IDS[:, :10], use_cache=True)
        parts = [out.logits]
        for at in range(10, IDS.shape[1]):
            out = view.model(IDS[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


def test_a_model_wide_request_asks_more_of_the_drafts():
    view = wide_view()
    fitted = [(Sirius(0.3, kernel_size=4), {}), teal(view, 0.3)]
    assert to_native(view, fitted, 0.3)[1][0].sparsity == pytest.approx(0.3 / 0.75)


def test_what_can_not_be_corrected_is_one_sentence():
    view = wide_view()
    with attached(view, [(Sirius(0.5), {})], DECODE), torch.no_grad():
        cache = StaticCache(config=view.model.config, max_cache_len=40)
        with pytest.raises(UnsupportedError, match="not timed"):
            view.model(IDS, past_key_values=cache)
        with pytest.raises(UnsupportedError, match="greedy"):
            view.model.generate(IDS, max_new_tokens=4, do_sample=True, custom_generate=view.generator)
        assert isinstance(StoppingCriteriaList(), list)
    assert "windows" in Sirius(0.5).unsupported(tiny.view("gemma2"))
    assert view.generator is None and "forward" not in view.model.__dict__
    for wrong in ({"kernel_size": 1}, {"threshold": 1.5}):
        with pytest.raises(ConfigError, match=r"method\.sirius"):
            Sirius(0.5, **wrong)


@pytest.mark.parametrize("nest", ["sirius", "[sirius,dense]", "meangate", "[sirius,meangate]"])
def test_what_wraps_others_is_refused_with_nothing_inside(nest: str):
    with pytest.raises(
        ConfigError, match=r"changes nothing by itself: nest a method .* method=\[(sirius|meangate),teal\]$"
    ):
        check(composed([f"method={nest}", "tasks=none"]))
    assert incomplete([Sirius(0.5), MeanGate(0.5), Teal(0.5)]) is incomplete([Teal(0.5), Sirius(0.5)]) is None
