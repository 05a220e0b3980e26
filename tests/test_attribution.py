"""Attribution: the score is the paper's, and the gradient is that of a token's own loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness.errors import ConfigError
from harness.execution.attach import attached
from harness.model.step import Policy
from methods.attribution import Attribution, Plan, attribution
from tests import tiny


def test_the_score_is_minus_gradient_times_output_plus_half_the_bound():
    x = torch.tensor([[[1.0], [-2.0]]])
    g = torch.tensor([[[3.0], [4.0]]])  # norm 5
    torch.testing.assert_close(attribution(x, g, corrected=False), torch.tensor([[-3.0, 8.0]]))
    torch.testing.assert_close(attribution(x, g), torch.tensor([[-3 + 0.5 * 1 * 5, 8 + 0.5 * 2 * 5]]))
    head = attribution(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, 0.0]]]))
    torch.testing.assert_close(head, torch.tensor([[-3 + 0.5 * 5 * 1]]))


def scores(view, ids) -> Plan:
    method = Attribution(0.5)
    with torch.no_grad(), attached(view, [(method, {})], Policy()):
        plan = Plan(view, method)
        view.tracker._before_forward(view.model, (ids,), {})
        plan.score(view.model, (ids,), {"use_cache": False})
    return plan


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_first_term_predicts_what_removing_a_neuron_of_the_last_block_does(family):
    """Finite differences of the loss by hand; scaling the neuron by 1 - h gives h * score to first order."""
    view = tiny.view(family)
    view.model.double()
    ids = tiny.tokens(1, 10)
    method = Attribution(0.5, corrected=False)
    plan = Plan(view, method)
    with torch.no_grad(), view.tracker.tracking(Policy()):
        view.tracker._before_forward(view.model, (ids,), {})
        plan.score(view.model, (ids,), {"use_cache": False})
        label = view.model(ids, use_cache=False).logits.argmax(-1)

        def loss(scale: float, token: int, neuron: int) -> torch.Tensor:
            def shrink(_, args):
                x = args[0].clone()
                x.view(1, 10, -1)[0, token, neuron] *= scale
                return (x,)

            handle = view.blocks[-1].down.register_forward_pre_hook(shrink)
            logits = view.model(ids, use_cache=False).logits
            handle.remove()
            return F.cross_entropy(logits[0], label[0], reduction="sum")

        h = 1e-2  # RMSNorm works in float32
        for token, neuron in ((0, 3), (4, 50), (9, 127)):
            slope = (loss(1 - h, token, neuron) - loss(1 + h, token, neuron)) / (2 * h)
            score = plan.scores["neurons", 2][0, token, neuron]
            assert slope.item() == pytest.approx(score.item(), rel=1e-2, abs=1e-4)


def test_a_token_is_judged_by_its_own_loss():
    view = tiny.view("llama")
    ids = tiny.tokens(1, 12)
    other = ids.clone()
    other[0, 8:] = tiny.tokens(1, 4, seed=9)
    a, b = scores(view, ids), scores(view, other)
    for key in a.scores:
        torch.testing.assert_close(a.scores[key][:, :8], b.scores[key][:, :8])
        assert not torch.allclose(a.scores[key][:, 8:], b.scores[key][:, 8:])


def test_the_scoring_pass_is_not_counted_and_leaves_the_cache_alone():
    view = tiny.view("llama")
    ids = tiny.tokens(2, 12)
    with torch.no_grad(), attached(view, [(Attribution(0.5), {})], Policy(), count=True) as ledger:
        out = view.model(ids, use_cache=True)
        assert out.past_key_values.get_seq_length() == 12
        out = view.model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        assert out.past_key_values.get_seq_length() == 13
    assert ledger.tokens.sum() == 26
    kept, total = ledger.kept[1, "neurons"].sum(), ledger.total[1, "neurons"].sum()
    assert kept / total == 0.5 and total == 26 * view.d_ff


def test_it_loses_less_than_keeping_the_lowest_scores():
    view = tiny.view("llama")
    ids = tiny.tokens(4, 32)
    with torch.no_grad():
        dense = view.model(ids, use_cache=False).logits.log_softmax(-1)

    class Worst(Attribution):
        def select(self, plan, site, layer, x, step):
            top = super().select(plan, site, layer, x, step)
            return None if top is None else type(top)(-top.score, top.k)

    loss = {}
    for cls in (Attribution, Worst):
        with torch.no_grad(), attached(view, [(cls(0.5, targets="mlp"), {})], Policy()):
            out = view.model(ids, use_cache=False).logits.log_softmax(-1)
        loss[cls] = -out.gather(-1, dense.argmax(-1, keepdim=True)).mean()
    assert loss[Attribution] < loss[Worst]


def test_bad_targets_are_one_sentence():
    with pytest.raises(ConfigError, match="targets"):
        Attribution(0.5, targets="all")
