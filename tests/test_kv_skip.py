"""KV-cache skipping: three policies, holes that stay holes, and stepping that equals scoring."""

from __future__ import annotations

import itertools

import pytest
import torch

import kernels
from harness.errors import ConfigError
from harness.execution.attach import attached
from harness.execution.check import check_kernels
from harness.execution.kernel import kernel_execution
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.sparsity import measure
from methods.kv_skip import KvSkip, head_energy
from methods.teal import Teal
from tests import tiny

FAMILIES = ("llama", "mistral", "opt")
LOSSY = [{"kv": "skip", "dropped": "exclude"}, {"kv": "skip", "dropped": "zeros"}]
POLICIES = [*LOSSY, {"kv": "recompute"}, {"kv": "mask_output"}]
SELECT = ("norm", "random", "serial", "lookahead")


def view_of(family: str, **changes) -> View:
    view = tiny.view(family, **changes)
    view.model.double()
    return view


def method_and_state(view: View, **options):
    method = KvSkip(**({"sparsity": 0.5, "unit": "group", "rank": 4, "epochs": 1} | options))
    assert method.unsupported(view) is None
    return method, method.fit(view, tiny.calibration(view))


@torch.no_grad()
def scored(view: View, fitted, ids, policy: Policy | None = None, **kwargs) -> torch.Tensor:
    with attached(view, [fitted], policy or Policy()):
        return view.model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def stepped(view: View, fitted, ids, prompt: int, policy: Policy | None = None, mask=None) -> torch.Tensor:
    """Logits of a prefill and single steps, as `generate` makes them: with a mask, positions leave padding out."""
    cache, pieces = None, []
    with attached(view, [fitted], policy or Policy()):
        for start, end in itertools.pairwise([0, *range(prompt, ids.shape[1] + 1)]):
            kwargs = {}
            if mask is not None:
                kwargs["attention_mask"] = mask[:, :end]
                kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
            out = view.model(ids[:, start:end], past_key_values=cache, use_cache=True, **kwargs)
            cache = out.past_key_values
            pieces.append(out.logits)
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", POLICIES, ids=str)
@pytest.mark.parametrize("select", SELECT)
def test_stepping_equals_scoring(family, options, select):
    view = view_of(family)
    fitted = method_and_state(view, select_by=select, **options)
    ids = tiny.tokens(2, 30)
    whole = scored(view, fitted, ids)
    torch.testing.assert_close(stepped(view, fitted, ids, prompt=14), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stepped(view, fitted, ids, prompt=1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("select", "unit"), itertools.product(("norm", "random"), ("head", "group")))
def test_recompute_equals_mask_output(family, select, unit):
    view = view_of(family)
    ids = tiny.tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding: rotary positions of the rebuilt keys must follow it
    outs = []
    for policy in ("mask_output", "recompute"):
        fitted = method_and_state(view, select_by=select, unit=unit, kv=policy, sparsity=0.75)
        outs.append(stepped(view, fitted, ids, prompt=14, mask=mask)[mask.bool()])
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-9, atol=1e-9)
    lossy = method_and_state(view, select_by=select, unit=unit, kv="skip", sparsity=0.75)
    assert (stepped(view, lossy, ids, prompt=14, mask=mask)[mask.bool()] - outs[0]).abs().max() > 1e-3


def test_recompute_really_rebuilds(monkeypatch):
    """With the rebuilt states spoilt the result changes: absent entries are not read from the cache."""
    from harness.execution import masked_heads as kv

    view = view_of("llama")
    fitted = method_and_state(view, kv="recompute", select_by="random")
    ids = tiny.tokens(1, 20)
    right = stepped(view, fitted, ids, prompt=8)
    monkeypatch.setattr(kv, "rotated", lambda k, cos, sin: k)
    assert (stepped(view, fitted, ids, prompt=8) - right).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_output_is_zeroed_heads_and_nothing_else(family):
    """The reference: a hook before o that zeroes the heads of least norm."""
    view = view_of(family)
    ids = tiny.tokens(2, 24)

    def zero(_, args):
        energy = head_energy(view, args[0])
        kept = energy.topk(view.n_heads // 2, dim=-1).indices
        keep = torch.zeros_like(energy, dtype=torch.bool).scatter_(-1, kept, True)
        return (args[0] * keep.repeat_interleave(view.head_dim, -1),)

    handles = [block.o.register_forward_pre_hook(zero) for block in view.blocks]
    with torch.no_grad():
        expected = view.model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    got = scored(view, method_and_state(view, kv="mask_output", unit="head"), ids)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", LOSSY, ids=str)
def test_skip_is_attention_without_the_entries(options):
    """One layer written out: softmax over the entries that exist, or over zeros in their place."""
    view = view_of("mistral", num_hidden_layers=1)
    method, state = method_and_state(view, select_by="random", **options)
    ids, seen = tiny.tokens(1, 12), {}
    block = view.blocks[0]
    handles = [
        module.register_forward_hook(lambda _m, _a, y, n=name: seen.update({n: y}))
        for name, module in (("q", block.q), ("k", block.k), ("v", block.v))
    ]
    handles.append(block.o.register_forward_pre_hook(lambda _m, args: seen.update(o=args[0])))
    handles.append(
        block.attn.register_forward_pre_hook(
            lambda _m, _a, kwargs: seen.update(rotary=kwargs["position_embeddings"]), with_kwargs=True
        )
    )
    scored(view, (method, state), ids)
    for handle in handles:
        handle.remove()
    cos, sin = seen["rotary"]

    def heads(x, n):
        return x.view(12, n, view.head_dim).transpose(0, 1)

    def rotate(x):
        a, b = x.chunk(2, -1)
        return x * cos[0] + torch.cat([-b, a], -1) * sin[0]

    q, k, v = rotate(heads(seen["q"], 8)), rotate(heads(seen["k"], 2)), heads(seen["v"], 2)
    keep = seen["o"].view(12, 8, view.head_dim).abs().sum(-1) > 0
    groups = keep.view(12, 2, 4).any(-1)
    assert 0 < groups.sum() < 24
    for head in range(8):
        group = head // 4
        for token in range(12):
            if not keep[token, head]:
                continue
            there = groups[: token + 1, group]
            keys, values = k[group, : token + 1].clone(), v[group, : token + 1].clone()
            if options["dropped"] == "zeros":
                keys[~there], values[~there] = 0, 0
            else:
                keys, values = keys[there], values[there]
            weights = (q[head, token] @ keys.T / view.head_dim**0.5).softmax(-1)
            got = seen["o"].view(12, 8, view.head_dim)[token, head]
            torch.testing.assert_close(got, weights @ values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_padding_changes_nothing(family, options):
    view = view_of(family)
    fitted = method_and_state(view, **options)
    ids = tiny.tokens(1, 20)
    expected = stepped(view, fitted, ids, prompt=10)
    left = torch.cat([tiny.tokens(1, 6, seed=5), ids], 1)
    left = torch.cat([left, tiny.tokens(1, 26, seed=6)])
    mask = torch.ones_like(left)
    mask[0, :6] = 0
    got = stepped(view, fitted, left, prompt=16, mask=mask)[:1, 6:]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    right = torch.cat([torch.cat([ids, tiny.tokens(1, 6, seed=5)], 1), tiny.tokens(1, 26, seed=6)])
    torch.testing.assert_close(scored(view, fitted, right)[:1, :20], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", LOSSY, ids=str)
def test_prompt_stays_whole_in_the_decode_phase(options):
    view = view_of("llama")
    fitted = method_and_state(view, **options)
    ids, policy = tiny.tokens(2, 24), Policy("decode")
    with torch.no_grad():
        dense = view.model(ids, use_cache=False).logits
    got = stepped(view, fitted, ids, 12, policy)
    torch.testing.assert_close(got[:, :12], dense[:, :12], rtol=1e-9, atol=1e-9)
    assert (got[:, 12:] - dense[:, 12:]).abs().max() > 1e-3
    decode = torch.zeros_like(ids, dtype=torch.bool)
    decode[:, 12:] = True
    with torch.no_grad(), attached(view, [fitted], policy), view.tracker.hint(torch.ones_like(decode), decode):
        whole = view.model(ids, use_cache=False).logits
    torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", POLICIES, ids=str)
def test_a_static_cache_and_a_cropped_cache_give_the_same(options):
    from transformers import StaticCache

    view = view_of("llama")
    fitted = method_and_state(view, **options)
    ids = tiny.tokens(1, 20)
    expected = scored(view, fitted, ids)
    with torch.no_grad(), attached(view, [fitted], Policy()):
        cache = StaticCache(config=view.model.config, max_cache_len=32)
        pieces = [view.model(ids[:, :10], past_key_values=cache, use_cache=True).logits]
        for t in range(10, 20):
            pieces.append(view.model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-9, atol=1e-9)
        out = view.model(ids[:, :15], use_cache=True)
        out.past_key_values.crop(-5)
        again = view.model(ids[:, 10:], past_key_values=out.past_key_values, use_cache=True).logits
    torch.testing.assert_close(again, expected[:, 10:], rtol=1e-9, atol=1e-9)


def test_the_ledger_counts_rows_of_k_and_v():
    view = view_of("mistral")
    touched = {}
    for policy in ("mask_output", "recompute", "skip"):
        fitted = method_and_state(view, kv=policy)
        with torch.no_grad(), attached(view, [fitted], Policy(), count=True) as ledger:
            view.model(tiny.tokens(2, 24), use_cache=False)
        total = ledger.tokens.sum().item()
        touched[policy] = {
            p: ledger.touched[0, p].sum().item() / (total * view.weights(p)) for p in ("q", "k", "v", "o")
        }
    half = pytest.approx(0.5)
    assert touched["mask_output"] == {"q": half, "k": 1.0, "v": 1.0, "o": half}
    assert touched["skip"] == touched["recompute"] == {"q": half, "k": half, "v": half, "o": half}


def test_groups_rule_entries():
    """Single heads: an entry goes only when all query heads of its group are dropped."""
    view = view_of("llama")  # 4 heads, 2 KV heads
    method, state = method_and_state(view, unit="head", select_by="random")
    with torch.no_grad(), attached(view, [(method, state)], Policy(), count=True) as ledger:
        view.model(tiny.tokens(2, 64), use_cache=False)
    total = ledger.tokens.sum().item()
    kept = ledger.touched[0, "k"].sum().item() / (total * view.weights("k"))
    assert kept == pytest.approx(1 - 1 / 6, abs=0.1)  # 2 of 4 heads dropped: both of one group in 1 of 6 draws
    rows = measure(view, [(method, state)], Policy(), tiny.tokens(2, 64))
    [share] = [r["value"] for r in rows if r["site"] == "heads" and r["layer"] is None and r["step_phase"] == "all"]
    assert share == 0.5


def test_it_nests_with_an_mlp_method():
    view = view_of("llama")
    teal = Teal(0.5)
    kv, state = method_and_state(view, kv="recompute")
    ids = tiny.tokens(1, 20)
    fits = [(teal, teal.fit(view, tiny.calibration(view)))]
    with torch.no_grad():
        outs = []
        for policy in ("recompute", "mask_output"):
            method, _ = method_and_state(view, kv=policy)
            for order in (1, -1):
                with attached(view, [*fits, (method, state)][::order], Policy()):
                    outs.append(view.model(ids, use_cache=False).logits)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-9, atol=1e-9)


def test_detach_restores_the_attention():
    view = view_of("llama")
    ids = tiny.tokens(1, 12)
    with torch.no_grad():
        before = view.model(ids).logits
        with pytest.raises(RuntimeError), attached(view, [method_and_state(view)], Policy()):
            raise RuntimeError
        assert view.model.config._attn_implementation == "sdpa"
        assert torch.equal(view.model(ids).logits, before)


@pytest.mark.parametrize("family", ("llama", "opt"))
@pytest.mark.parametrize("options", POLICIES, ids=str)
@pytest.mark.parametrize("padding", (0, 3))
def test_kernels_step_as_masks_do(family, options, padding, monkeypatch):
    """Token by token over a static cache that a masked prompt filled, with holes in both."""
    from transformers import StaticCache

    view = tiny.view(family)
    fitted = method_and_state(view, select_by="random", unit="head", sparsity=0.75, **options)
    ids = tiny.tokens(1, 26)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    rows, attention = [], []
    row_gemv_index, decode_attention = kernels.row_gemv_index, kernels.decode_attention
    monkeypatch.setattr(kernels, "row_gemv_index", lambda *a: rows.append(len(a[2])) or row_gemv_index(*a))
    monkeypatch.setattr(kernels, "decode_attention", lambda *a: attention.append(a) or decode_attention(*a))
    outs = []
    for execution in (attached, kernel_execution):
        cache, pieces = StaticCache(config=view.model.config, max_cache_len=32), []
        with torch.no_grad(), execution(view, [fitted], Policy()):
            for start, end in itertools.pairwise([0, *range(14, 27)]):
                more = {"attention_mask": mask[:, :end]} if padding else {}
                out = view.model(ids[:, start:end], past_key_values=cache, use_cache=True, **more)
                pieces.append(out.logits[:, padding if start == 0 else 0 :])
        outs.append(torch.cat(pieces, 1))
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    steps, kept = 12 * view.n_layers, view.head_dim  # one head of four, and so one group of two (opt: of four)
    steps = 0 if padding else steps  # padding is masked
    assert rows == [kept] * steps * (1 if options["kv"] == "mask_output" else 3), "one head's rows, and its group's"
    assert len(attention) == steps


@pytest.mark.gpu
@pytest.mark.parametrize("options", POLICIES, ids=str)
@pytest.mark.parametrize("unit", ("head", "group"))
def test_kernels_equal_masks_on_a_gpu(options, unit):
    from transformers import LlamaConfig, LlamaForCausalLM

    from harness.model.families import view_of as seen_as

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=16,
        num_key_value_heads=8,
    )  # fmt: skip
    view = seen_as(LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False))
    method = KvSkip(0.75, select_by="random", unit=unit, **options)
    assert check_kernels(view, [(method, {})], tiny.tokens(1, 128).to("cuda")).error < 2e-2


def test_another_method_on_the_same_projections_leaves_it_masked():
    view = tiny.view("llama")
    kv, state = method_and_state(view, select_by="random")
    teal = Teal(0.5)
    both = [(teal, teal.fit(view, tiny.calibration(view))), (kv, state)]
    check_kernels(view, both, tiny.tokens(1, 20))
    with kernel_execution(view, both, Policy()) as installations:
        assert len(installations) == 1


def test_what_can_skip_nothing_is_said():
    one = view_of("llama", num_key_value_heads=1)
    assert "one KV group" in (KvSkip(0.5).unsupported(one) or "")
    assert KvSkip(0.5, kv="mask_output").unsupported(one) is None
    assert "one KV group" in (KvSkip(0.5, kv="mask_output", unit="group").unsupported(one) or "")
    mistral = view_of("mistral")
    assert "fewer than" in (KvSkip(0.25).unsupported(mistral) or "")
    assert "drops none of the 2 KV groups" in (KvSkip(0.2, unit="group").unsupported(mistral) or "")
    assert KvSkip(0.5, unit="group").unsupported(mistral) is None
    assert KvSkip(0.5, select_by="lookahead", lookahead=9).unsupported(mistral)


def test_the_predictor_shares_its_fit_with_dejavu():
    from methods.dejavu import DejaVu

    assert KvSkip(0.5, select_by="serial").fit_key() == DejaVu(0.3, targets="heads").fit_key()
    assert KvSkip(0.5).fit_key()["method"] == "kv_skip"


@pytest.mark.parametrize(
    "wrong", [{"kv": "drop"}, {"select_by": "magic"}, {"dropped": "no"}, {"unit": "layer"}, {"rank": 0}]
)
def test_bad_options_are_one_sentence(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        KvSkip(0.5, **wrong)
