"""Polar Sparsity and skip-softmax by hand, and what they read of the cache."""

from __future__ import annotations

import math

import pytest
import torch

from harness.errors import UnsupportedError
from harness.execution.attach import attached
from harness.model.step import Policy, Step
from harness.probes.sparsity import measure
from kernels import reference
from methods.dejavu import DejaVu
from methods.kv_skip import KvSkip
from methods.polar import Polar, group_energy
from methods.skip_softmax import SkipSoftmax, by_tile, context_of, decide
from tests import tiny

DECODE = Policy("decode")


def fitted(view, method):
    return method, method.fit(view, tiny.calibration(view))


def kv_rows(view, pair, policy):
    rows = measure(view, [pair], policy, tiny.tokens(4, 64, seed=3))
    return {(r["metric"], r["step_phase"], r["layer"]): r["value"] for r in rows if r["site"] == "kv"}


def step_of(prompt: list[int], length: int) -> Step:
    """Sequences that begin with so many prompt tokens and go on with decoded ones, without padding."""
    position = torch.arange(length).expand(len(prompt), -1)
    decode = position >= torch.tensor(prompt)[:, None]
    return Step(torch.ones_like(decode), decode, position, None, 0, None)


def test_polar_reads_the_groups_it_keeps_and_all_of_the_first_block():
    view = tiny.view("llama")  # 2 groups
    rows = kv_rows(view, fitted(view, Polar(0.5, epochs=1)), DECODE)
    assert rows["kv_bytes", "prefill", None] == rows["kv_bytes_dense", "prefill", None], "a prompt stays dense"
    assert ("achieved", "decode", 0) not in rows
    for layer in range(1, view.n_layers):
        assert rows["achieved", "decode", layer] == 0.5
    share = rows["kv_bytes", "decode", None] / rows["kv_bytes_dense", "decode", None]
    assert share == pytest.approx((1 + (view.n_layers - 1) / 2) / view.n_layers)


def test_polar_makes_all_k_and_v_and_no_query_of_a_dropped_head():
    view = tiny.view("llama")
    with torch.no_grad(), attached(view, [fitted(view, Polar(0.5, epochs=1))], Policy(), count=True) as ledger:
        view.model(tiny.tokens(2, 16), use_cache=False)
    touched = {p: ledger.touched[1, p].sum().item() / (32 * view.weights(p)) for p in "qkvo"}
    assert touched == {"q": 0.5, "k": 1.0, "v": 1.0, "o": 0.5}


def test_the_oracle_keeps_the_groups_of_largest_norm():
    view = tiny.view("llama")
    x = torch.zeros(1, 1, view.n_heads * view.head_dim)
    x[..., : view.head_dim] = 1.0  # head 0
    x[..., 3 * view.head_dim :] = 2.0  # head 3
    assert group_energy(view, x).flatten().tolist() == [view.head_dim, 4 * view.head_dim]


def test_a_router_learns_what_its_input_tells():
    torch.manual_seed(0)
    x, true = torch.randn(2000, 32), torch.randn(4, 32)
    labels = x @ true.T + torch.tensor([3.0, -3.0, 0.0, 0.0]) * 5 > 0
    made = Polar(0.5, epochs=50)._train(x, labels, 0)
    guessed = x @ made["weight"].T + made["bias"] > 0
    assert made["weight"].shape == (4, 32) and made["bias"].shape == (4,)
    assert (guessed == labels).float().mean() > 0.9
    assert made["bias"][0] > 0 > made["bias"][1]


def test_polar_says_what_it_cannot_do():
    view = tiny.view("llama")
    assert "drops none" in str(Polar(0.1).unsupported(view))
    assert "stay dense" in str(Polar(0.5, dense_layers=view.n_layers).unsupported(view))
    assert Polar(0.5).unsupported(view) is None


# --------------------------------------------------------------------------------------------- skip-softmax


def test_the_threshold_falls_as_the_context_grows():
    scale = {"prefill": math.log(8.0), "decode": math.log(4.0)}
    step = step_of([4, 16], 17)  # token 16 of both is decoded and sees 17 entries
    assert torch.allclose(context_of(step)[:, 0].exp(), torch.tensor([4.0, 16.0]).double())
    gap = math.log(4 / 17)
    for shift, kept in ((1e-6, True), (-1e-6, False)):
        gaps = torch.full((2, 1, 17, 1), gap + shift)
        assert decide(scale, 1, 0, gaps, step)[:, 0, 16, 0].tolist() == [kept, kept]
    gaps = torch.full((2, 1, 17, 1), -1e-3)  # 8 / 4 is more than 1: only what is the largest so far stays
    keep = decide(scale, 1, 0, gaps, step)
    assert keep[:, 0, 0, 0].tolist() == [False, True]
    assert decide(scale, 1, 0, torch.zeros(2, 1, 17, 1), step).all()


def test_a_tile_of_a_prompt_keeps_what_one_of_its_tokens_needs_and_decoded_tokens_decide_alone():
    gaps = torch.tensor([-9.0, -1.0, -9.0, -8.0, -2.0, -7.0]).view(1, 1, 6, 1)
    assert by_tile(gaps, step_of([5], 6), 2).flatten().tolist() == [-1.0, -1.0, -8.0, -8.0, -2.0, -7.0]
    assert torch.equal(by_tile(gaps, step_of([0], 6), 2), gaps)


def test_a_decoded_token_skips_what_the_definition_of_the_kernel_skips():
    """Masked execution inside a model against kernels/reference.py on that layer's own q, K and V."""
    view = tiny.view("llama")
    view.model.double()
    method, state = fitted(view, SkipSoftmax(0.6, block=4, tile=4))
    seen = {}

    def see(_, args, kwargs, out):
        seen["args"], seen["cache"], seen["out"] = kwargs, kwargs["past_key_values"], out[0]

    q = []
    block = view.blocks[1]
    handles = [
        block.attn.register_forward_hook(see, with_kwargs=True),
        block.q.register_forward_hook(lambda *a: q.append(a[2])),
    ]
    ids = tiny.tokens(2, 30)
    with torch.no_grad(), attached(view, [(method, state)], DECODE):
        out = view.model(ids[:, :29], use_cache=True)
        view.model(ids[:, 29:], past_key_values=out.past_key_values, use_cache=True)
    for handle in handles:
        handle.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = seen["args"]["position_embeddings"]
    query = q[-1].view(2, 1, view.n_heads, -1).transpose(1, 2)
    query, _ = apply_rotary_pos_emb(query, query, cos, sin)
    layer = seen["cache"].layers[1]
    scale = method._log_scale(state)["decode"]
    want = reference.skip_softmax(query, layer.keys, layer.values, torch.tensor(30), scale, 4)
    dense = reference.decode_attention(query, layer.keys, layer.values, torch.tensor(30))
    with torch.no_grad():
        torch.testing.assert_close(seen["out"], block.o(want.transpose(1, 2).flatten(2)), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(want, dense), "something was skipped"


def test_k_is_read_whole_and_the_requested_share_of_v_is_not():
    view = tiny.view("llama")
    for sparsity in (0.1, 0.2):  # far from lambda = 1, at which the shortest contexts skip no more
        rows = kv_rows(view, fitted(view, SkipSoftmax(sparsity, block=4, tile=1)), DECODE)
        assert rows["achieved", "decode", None] == pytest.approx(sparsity / 2, abs=0.03)
    rows = kv_rows(view, fitted(view, SkipSoftmax(0.99, block=4, tile=1)), Policy())
    assert rows["achieved", "all", None] < 0.5


def test_left_padding_moves_no_block():
    view = tiny.view("llama")
    view.model.double()
    pair = fitted(view, SkipSoftmax(0.5, block=4, tile=4))
    ids, other = tiny.tokens(1, 13), tiny.tokens(1, 18, seed=4)
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad(), attached(view, [pair], Policy(), count=True) as alone:
        want = view.model(ids, use_cache=False).logits
    with torch.no_grad(), attached(view, [pair], Policy()):
        padded = torch.cat([torch.cat([other[:, :5], ids], 1), other])
        got = view.model(padded, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(got[:1, 5:], want, rtol=1e-6, atol=1e-6)  # rotary angles are of float32
    assert alone.kv_read[1][0] < alone.kv_seen[1][0]


def test_two_that_decide_what_attention_reads_are_refused():
    view = tiny.view("llama")
    blocks, polar = fitted(view, SkipSoftmax(0.5, block=4)), fitted(view, Polar(0.5, epochs=1))
    with pytest.raises(UnsupportedError, match="KV cache"), attached(view, [polar, blocks], Policy()):
        pass
    kv = KvSkip(0.5, select_by="random", unit="group")
    with pytest.raises(UnsupportedError, match="KV cache"), attached(view, [blocks, (kv, {})], Policy()):
        pass
    heads = DejaVu(0.5, targets="heads", predictor="random")
    with torch.no_grad(), attached(view, [(heads, {}), blocks], Policy(), count=True) as ledger:  # zeros before o: fine
        view.model(tiny.tokens(2, 24), use_cache=False)
    assert 0 < ledger.kv_read[0][0] < ledger.kv_seen[0][0]
