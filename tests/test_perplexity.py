"""Running text: what is scored, over what its errors are, what is marked, and how much of it is made at once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from harness.data.text import Windows
from harness.errors import MeasurementError
from harness.execution.attach import attached
from harness.model import logits
from harness.model.step import Policy
from harness.probes import perplexity
from methods.random import Random
from tests import tiny


def windows(count: int, length: int, available: int | None = None) -> Windows:
    tokens = tiny.tokens(count, length)
    return Windows(tokens, torch.ones_like(tokens), available or count)


def measured(view, method, text, kl_windows=0, policy=Policy(), longest=512):  # noqa: B008 (frozen)
    """Rows by metric of a method, its scores by window, beside the dense cell where windows are compared."""
    _, _, dense = perplexity.measure(view, [], policy, text, kl_windows, None, longest)
    rows, samples, _ = perplexity.measure(view, [(method, {})], policy, text, kl_windows, dense or {}, longest)
    return {row["metric"]: row for row in rows}, samples


@pytest.mark.parametrize("phase", ["all", "decode"])
def test_values_are_those_of_the_definition(phase):
    view, text, policy = tiny.view("llama"), windows(4, 24), Policy(phase)
    rows, samples = measured(view, Random(0.5), text, 3, policy)
    start = 12 if phase == "decode" else 0
    decode = torch.zeros_like(text.tokens, dtype=torch.bool)
    decode[:, start:] = phase == "decode"
    with torch.no_grad():
        dense = view.model(text.tokens).logits[:, start:-1].log_softmax(-1)
        with attached(view, [(Random(0.5), {})], policy), view.tracker.hint(torch.ones_like(decode), decode):
            sparse = view.model(text.tokens).logits[:, start:-1].log_softmax(-1)
    nll = F.nll_loss(sparse.flatten(0, 1), text.tokens[:, start + 1 :].flatten(), reduction="none").view(4, -1)
    assert rows["nll"]["value"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert rows["token_perplexity"]["value"] == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    assert rows["nll"]["stderr"] == pytest.approx(nll.mean(1).std().item() / 2, rel=1e-4)
    assert samples["nll"].tolist() == pytest.approx(nll.sum(1).tolist(), rel=1e-5)
    # KL is over dense's distribution; its error is over windows, since the tokens of one are not independent.
    kl = (dense.exp() * (dense - sparse)).sum(-1)[:3].mean(1)
    assert rows["kl_to_dense"]["value"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert rows["kl_to_dense"]["stderr"] == pytest.approx((kl.std() / math.sqrt(3)).item(), rel=1e-3)
    same = (dense.argmax(-1) == sparse.argmax(-1)).float()[:3].mean(1)
    assert rows["top1_agreement"]["value"] == pytest.approx(same.mean().item())
    assert rows["top1_agreement"]["stderr"] == pytest.approx((same.std() / math.sqrt(3)).item(), abs=1e-7)
    assert samples["kl"].tolist()[:3] == pytest.approx(kl.tolist(), rel=1e-3) and samples["kl"].isna()[3]


def test_one_window_has_no_error_and_dense_no_divergence():
    view = tiny.view("llama")
    rows, _ = measured(view, Random(0.0), windows(1, 16), 1)
    assert {row["stderr"] for row in rows.values()} == {None}
    assert rows["kl_to_dense"]["value"] == 0.0 and rows["top1_agreement"]["value"] == 1.0


@pytest.mark.parametrize(("count", "available", "smoke"), [(16, 99, True), (32, 99, False), (16, 16, False)])
def test_little_text_is_a_smoke_run_unless_it_is_all(monkeypatch, count, available, smoke):
    monkeypatch.setitem(perplexity.limited.__globals__["WHOLE"], "tokens", 32 * 16)
    rows, _ = measured(tiny.view("llama"), Random(0.5), windows(count, 16, available), 4)
    kl = ("kl_to_dense", "top1_agreement")
    assert {rows[name]["limited"] for name in rows.keys() - set(kl)} == {smoke}
    assert {rows[name]["limited"] for name in kl} == {True}, "four windows are compared"


def test_windows_longer_than_the_model_was_made_for_are_counted():
    view, text = tiny.view("llama"), windows(3, 16)
    for longest, cut in ((16, 0), (15, 3)):
        row = measured(view, Random(0.5), text, longest=longest)[0]["truncated"]
        assert (row["value"], row["n"], row["unit"]) == (cut, 3, "windows")
        assert bool(row["message"]) == bool(cut)


def test_logits_that_are_no_numbers_are_named():
    view = tiny.view("llama")
    view.final_norm.weight.data.fill_(torch.nan)
    with pytest.raises(MeasurementError, match="NaN, not a number, for window 0 of the perplexity text"):
        perplexity.measure(view, [], Policy(), windows(2, 16), 0, None, 512)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in view.model.modules())


def test_few_logits_are_made_at_a_time(monkeypatch):
    """Of 8,192 tokens and a vocabulary of 151,936 the whole is 5 GB in float32, and KL needs it twice."""
    view, text = tiny.view("llama"), windows(2, 50)
    whole, _ = measured(view, Random(0.5), text, 2)
    head = view.model.get_output_embeddings()
    made: list[int] = []
    handle = head.register_forward_hook(lambda _m, _a, out: made.append(out.numel()))
    monkeypatch.setattr(logits, "PIECE", 7 * tiny.VOCABULARY)
    pieces, _ = measured(view, Random(0.5), text, 2)
    handle.remove()
    assert max(made) == 7 * tiny.VOCABULARY
    for metric, row in whole.items():
        assert pieces[metric]["value"] == pytest.approx(row["value"], rel=1e-5, abs=1e-7)
