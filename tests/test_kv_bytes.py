"""Reads of the KV cache that the ledger counts: hand-made cases of groups, padding, windows, holes and blocks."""

from __future__ import annotations

import pytest
import torch

from harness.execution import masked_heads
from harness.execution.attach import attached
from harness.execution.ledger import Ledger
from harness.model.sees import INPUT
from harness.model.step import Policy
from harness.probes.latency.reads import cache_bytes, step_bytes
from harness.probes.sparsity import rows_of
from methods.dense import Dense
from methods.kv_skip import KvSkip
from tests import tiny
from tests.test_ledger import Fixed


def entry(view) -> int:
    """Bytes of one K or V vector of one group."""
    return view.head_dim * view.dtype.itemsize


@torch.no_grad()
def counted(view, *methods, ids=None, **kwargs) -> Ledger:
    fits = [(m, {}) for m in methods] or [(Dense(), {})]
    with attached(view, fits, Policy(), count=True) as ledger:
        view.model(tiny.tokens(2, 8) if ids is None else ids, use_cache=False, **kwargs)
    return ledger


def test_dense_attention_reads_all_that_a_token_sees():
    view = tiny.view("llama")  # 4 heads in 2 groups
    ledger = counted(view)
    tokens = sum(range(1, 9))  # of one sequence of 8: the first sees itself, the last all eight
    for layer in range(view.n_layers):
        assert ledger.kv_seen[layer].tolist() == [2 * 2 * 2 * tokens * entry(view), 0]
        assert torch.equal(ledger.kv_read[layer], ledger.kv_seen[layer])


@pytest.mark.parametrize(
    ("keep", "groups"),
    [
        ((True, False, False, False), 1),
        ((False, True, True, False), 2),
        ((True, True, False, False), 1),
        ((False,) * 4, 0),
    ],
)
def test_a_group_is_read_if_any_of_its_query_heads_needs_it(keep, groups):
    ledger = counted(tiny.view("llama"), Fixed(keep=keep, site="heads"))
    assert (ledger.kv_read[0] / ledger.kv_seen[0])[0] == groups / 2


def test_what_nested_methods_drop_is_dropped_once():
    first, second = (True, True, True, False), (False, True, True, True)
    view = tiny.view("llama")
    ledger = counted(view, Fixed(keep=first, site="heads"), Fixed(keep=second, site="heads"))
    assert torch.equal(ledger.kv_read[0], ledger.kv_seen[0])  # heads 1 and 2 are left, one of each group
    ledger = counted(
        view, Fixed(keep=(True, True, True, False), site="heads"), Fixed(keep=(True, True, False, True), site="heads")
    )
    assert (ledger.kv_read[0] / ledger.kv_seen[0])[0] == 0.5


def test_padding_reads_nothing_and_is_not_seen():
    view, ids = tiny.view("llama"), tiny.tokens(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :5] = 0  # a sequence of three
    ledger = counted(view, ids=ids, attention_mask=mask)
    assert ledger.kv_seen[0][0] == (sum(range(1, 4)) + sum(range(1, 9))) * 2 * 2 * entry(view)
    alone = counted(view, ids=ids[:1, 5:]).kv_seen[0] + counted(view, ids=ids[1:]).kv_seen[0]
    assert torch.equal(ledger.kv_seen[0], alone)


def test_a_sliding_window_bounds_what_is_seen():
    view = tiny.view("mistral")
    for block in view.blocks:
        block.attn.config.sliding_window = 3
    ledger = counted(view)
    seen = 1 + 2 + 3 * 6
    assert ledger.kv_seen[0][0] == 2 * seen * 2 * view.n_kv_heads * entry(view)
    assert cache_bytes(view, 8) == view.n_layers * 3 * 2 * view.n_kv_heads * entry(view)


def test_steps_are_decode_and_one_pass_counts_what_steps_count():
    view, ids = tiny.view("llama"), tiny.tokens(2, 8)
    fits = [(Fixed(keep=(True, False, False, False), site="heads"), {})]
    with torch.no_grad(), attached(view, fits, Policy(), count=True) as steps:
        out = view.model(ids[:, :5], use_cache=True)
        for t in range(5, 8):
            out = view.model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
    prompt, decode = (2 * sum(at) * 2 * 2 * entry(view) for at in (range(1, 6), range(6, 9)))
    assert steps.kv_seen[0].tolist() == [prompt, decode]
    assert steps.kv_read[0].tolist() == [prompt / 2, decode / 2]


@pytest.mark.parametrize("dropped", ["exclude", "zeros"])
def test_entries_that_do_not_exist_are_not_read(dropped):
    """Tokens 0 to 3 of 4 keep groups (0), (1), (0), (0, 1): what each reads of the cache is counted by hand."""
    view = tiny.view("llama")
    groups = torch.tensor([[True, False], [False, True], [True, False], [True, True]])

    def decide(layer, x, step):
        return groups[step.position].repeat_interleave(2, -1)

    with torch.no_grad(), view.tracker.tracking(Policy()), masked_heads.skipping(view, INPUT, decide, "skip", dropped):
        ledger = Ledger(view, frozenset({"heads"}))
        with ledger.counting():
            view.model(tiny.tokens(1, 4), use_cache=False)
    read = [1, 1, 2, 3 + 2]  # token 3: entries 0, 2, 3 of the first group and 1, 3 of the second
    assert ledger.kv_read[0][0] == 2 * sum(read) * entry(view)
    assert ledger.kv_seen[0][0] == 2 * 2 * sum(range(1, 5)) * entry(view)


def test_rows_have_numerator_and_denominator_by_phase():
    view = tiny.view("llama")
    ledger = counted(view, KvSkip(0.5, select_by="random", unit="group", kv="mask_output"))
    rows = {
        (r["metric"], r["step_phase"]): r
        for r in rows_of(view, ledger, {"mlp": 0, "attn": 0})
        if r["site"] == "kv" and r["layer"] is None
    }
    assert {phase for _, phase in rows} == {"prefill", "all"}
    read, dense = rows["kv_bytes", "all"], rows["kv_bytes_dense", "all"]
    assert (read["unit"], read["n"]) == ("bytes/token", 16)
    assert dense["value"] == view.n_layers * 2 * 2 * sum(range(1, 9)) / 8 * entry(view)
    assert read["value"] == dense["value"] / 2 and rows["achieved", "all"]["value"] == 0.5


def test_a_batch_reads_a_cache_for_each_sequence_and_its_weights_once():
    view = tiny.view("llama")
    weights = step_bytes(view, 1.0, 1, 0)
    for batch, context, share in ((1, 10, 1.0), (8, 10, 0.5), (64, 100, 0.25)):
        assert step_bytes(view, 1.0, batch, context, share) == weights + batch * share * cache_bytes(view, context)
    assert cache_bytes(view, 10) == view.n_layers * 10 * 2 * 2 * entry(view)
