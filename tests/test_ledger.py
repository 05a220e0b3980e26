"""What the ledger counts where methods nest, and where sequences of a batch end at different times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from torch import Tensor

from harness.execution.attach import attached
from harness.execution.method import Method
from harness.model.families import view_of
from harness.model.lm import HarnessLM
from harness.model.sees import GATE, INPUT, OUTPUT, Sees
from harness.model.selection import Mask, TopK, top_k_count
from harness.model.step import Policy
from tests import tiny


@dataclass(frozen=True)
class Fixed(Method):
    """Keeps the rows of a site that its mask says, whatever it sees."""

    keep: tuple[bool, ...] = ()
    site: str = "neurons"
    sees: Sees = INPUT

    name: ClassVar[str] = "fixed"
    paper: ClassVar[str] = "-"

    @property
    def sites(self) -> Mapping[str, Sees]:
        return {self.site: self.sees}

    def select(self, plan, site, layer, x: Tensor, step) -> Mask:
        return Mask(torch.tensor(self.keep).expand(*x.shape[:2], -1))


@dataclass(frozen=True)
class Half(Method):
    """Drops the smaller half of the product before down."""

    name: ClassVar[str] = "half"
    paper: ClassVar[str] = "-"

    @property
    def sites(self) -> Mapping[str, Sees]:
        return {"neurons": OUTPUT}

    def select(self, plan, site, layer, x: Tensor, step) -> TopK:
        return TopK(x.abs(), top_k_count(x.shape[-1], 0.5))


def count(view, methods):
    with torch.no_grad(), attached(view, [(m, {}) for m in methods], Policy(), count=True) as ledger:
        view.model(tiny.tokens(2, 8), use_cache=False)
    return ledger


def skipped(ledger, *projections) -> float:
    part, whole = ledger.skipped_weights(projections)
    return (part.sum() / whole.sum()).item()


@pytest.mark.parametrize(("site", "n", "projections"), [("neurons", 128, ("gate", "up", "down")), ("heads", 4, "qo")])
def test_two_droppers_of_the_same_half_drop_that_half_once(site, n, projections):
    half = Fixed(keep=(True, False) * (n // 2), site=site)
    view = tiny.view("llama")
    once, twice = count(view, [half]), count(view, [half, half])
    for ledger in (once, twice):
        assert skipped(ledger, *projections) == 0.5
        for layer in range(view.n_layers):
            assert (ledger.kept[layer, site] / ledger.total[layer, site])[0] == 0.5
            assert ledger.total[layer, site].tolist() == [16 * n, 0], "each token is counted once"


@given(st.lists(st.lists(st.booleans(), min_size=128, max_size=128), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None)
def test_nested_droppers_keep_what_all_of_them_keep(masks):
    kept = sum(all(column) for column in zip(*masks, strict=True))
    ledger = count(tiny.view("llama"), [Fixed(keep=tuple(mask)) for mask in masks])
    assert skipped(ledger, "gate", "up", "down") == pytest.approx(1 - kept / 128, abs=1e-12)
    assert (ledger.kept[0, "neurons"] / ledger.total[0, "neurons"])[0] == pytest.approx(kept / 128, abs=1e-12)


def test_a_gate_that_one_of_them_reads_is_read_whole():
    first, second = (True, False) * 64, (True, True, False, False) * 32
    for sees in ((GATE, INPUT), (INPUT, GATE)):
        methods = [Fixed(keep=keep, sees=s) for keep, s in zip((first, second), sees, strict=True)]
        ledger = count(tiny.view("llama"), methods)
        assert skipped(ledger, "gate") == 0.0
        assert skipped(ledger, "up", "down") == 0.75


# --------------------------------------------------------------------------------------------- ends of sequences


@pytest.fixture(scope="module")
def lm(tokenizer):
    model = tiny.make("llama", vocabulary=len(tokenizer)).double()
    return HarnessLM(view_of(model), tokenizer, batch_size=1, max_length=512)


def generated(lm, prompts, batch: int, until, longest: int):
    """Answers, and what the ledger counted: (tokens, touched) by phase."""
    lm.batch_size_per_gpu = batch
    facts = {"until": list(until), "max_gen_toks": longest}
    requests = [
        Instance("generate_until", {}, (prompt, dict(facts)), 0, ("t", number, 1))
        for number, prompt in enumerate(prompts)
    ]
    with attached(lm.view, [(Half(0.5), {})], Policy(), count=True) as ledger:
        answers = lm.generate_until(requests)
    return answers, ledger.tokens, sum(ledger.touched.values())


WORDS = st.lists(st.sampled_from(["river", "stone", "a", "Question:", "light", "\n", "7"]), min_size=1, max_size=6)


@given(st.lists(WORDS.map(" ".join), min_size=2, max_size=5), st.sampled_from([("e",), ("a", "o"), ("\n\n", "th")]))
@settings(max_examples=8, deadline=None)
def test_what_is_counted_does_not_depend_on_who_shares_a_batch(lm, prompts, until):
    alone = generated(lm, prompts, 1, until, 12)
    together = generated(lm, prompts, len(prompts), until, 12)
    assert together[0] == alone[0]
    assert together[1].tolist() == alone[1].tolist()
    torch.testing.assert_close(together[2], alone[2])


def test_an_answer_is_over_at_its_stop_string_and_at_the_end_of_text(lm):
    """Of n tokens that are generated, the last is fed to nobody: n - 1 decode tokens."""
    prompts = ["The river", "Stone and light and more", "7"]
    free, tokens, _ = generated(lm, prompts, 3, ["\0"], 9)
    assert tokens[1] == 3 * 8
    first = lm.tok_encode(free[0])[0]
    stop = lm.tok_decode([first])
    (cut, *rest), tokens, _ = generated(lm, prompts, 3, [stop], 9)
    assert cut == "" and rest == [text.split(stop)[0] for text in free[1:]]
    assert tokens[1] < 3 * 8
    before, lm.model.generation_config.eos_token_id = lm.model.generation_config.eos_token_id, first
    try:
        _, tokens, _ = generated(lm, prompts[:1] * 3 + prompts[1:2], 4, ["\0"], 9)
    finally:
        lm.model.generation_config.eos_token_id = before
    assert tokens[1] <= 8, "three sequences end with their first token"
