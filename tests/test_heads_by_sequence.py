"""Attention in which each sequence of a batch drops KV heads, or blocks of V, of its own: kernels against masks.

What is marked so runs in Triton's interpreter (tests/interpreter.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import kernels
import kernels.cuda as kc
from harness.execution import masked_heads
from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.sees import INPUT
from harness.model.step import Policy
from kernels import reference
from methods.polar import Polar
from methods.teal import Teal
from tests.interpreter import INTERPRETED, error, interpreted, run_interpreted, starts_it
from tests.tiny import tokens


def inputs(b, h, g, s, d, dtype=torch.float32):
    return (torch.randn(b, n, length, d).to(dtype) for n, length in ((h, 1), (g, s), (g, s)))


@pytest.mark.parametrize(("h", "g"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("per_head", [False, True])
def test_one_flag_for_all_entries_is_that_flag_at_every_entry(h, g, per_head):
    torch.manual_seed(0)
    q, k, v = inputs(3, h, g, 9, 16)
    keep = torch.rand(3, h if per_head else g, 1) < 0.5
    keep[0] = False
    for dropped in ("exclude", "zeros"):
        want = reference.decode_attention(q, k, v, torch.tensor(7), keep.expand(-1, -1, 9), dropped)
        assert (want[0] == 0).all()
        assert error(reference.decode_attention(q, k, v, torch.tensor(7), keep, dropped), want) == 0
        assert error(kernels.decode_attention(q, k, v, torch.tensor(7), keep, dropped), want) <= 1e-5
        if INTERPRETED:
            assert error(kc.decode_attention(q, k, v, 7, keep, dropped, tile=(2, 16, 1)), want) <= 1e-5


@pytest.mark.parametrize("path", ["cpu", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize(("h", "g"), [(2, 2), (4, 2)])
def test_nothing_of_a_dropped_group_is_read(path, h, g):
    """Neither K nor V: NaN there would show."""
    q, k, v = inputs(2, h, g, 8, 16)
    keep = torch.tensor([[True, False], [False, True]])[..., None]
    dropped = ~keep[..., None].expand_as(k)
    want = reference.decode_attention(q, k, v, torch.tensor(8), keep)
    broken = (q, k.masked_fill(dropped, torch.nan), v.masked_fill(dropped, torch.nan))
    got = kernels.decode_attention(*broken, torch.tensor(8), keep) if path == "cpu" else kc.decode_attention(
        *broken, 8, keep, tile=(2, 16, 1)
    )  # fmt: skip
    assert error(got, want) <= 1e-5


@interpreted
@pytest.mark.parametrize(("h", "g"), [(3, 3), (6, 3)])
def test_the_kernel_picks_the_largest_scores_of_each_sequence(h, g):
    """Also of equal ones, the first; and the new token of a group that is not picked goes into the cache as well."""
    from kernels.cuda.attention import Choice, attend_step

    torch.manual_seed(0)
    b, s, d = 3, 24, 16
    caches = [torch.randn(b, g, s, d) for _ in range(2)]
    wide = torch.randn(b, (h + 2 * g) * d + g + 5)
    scores = wide[:, -g - 5 : -5]
    scores[0] = torch.tensor([1.0, 1.0, 0.0])
    scores[1] = 0.5
    angle = torch.rand(d // 2).repeat(2)
    out = torch.full((b, h * d), torch.nan)
    attended = {}
    for top in (1, 2, 3):
        k, v = (c.clone() for c in caches)
        attend_step(
            wide,
            angle.cos(),
            angle.sin(),
            k,
            v,
            torch.tensor(20),
            out,
            n_heads=h,
            scale=0.3,
            choice=Choice(scores, top),
        )
        attended[top] = out.clone().view(b, g, -1)
        assert not torch.equal(k[:, :, 20], caches[0][:, :, 20]) and torch.equal(k[:, :, 21:], caches[0][:, :, 21:])
    assert (attended[3] != 0).all()
    for top in (1, 2):
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top]
        keep = torch.zeros(b, g, dtype=torch.bool).scatter_(1, best, True)
        assert (attended[top][~keep] == 0).all()
        assert torch.equal(attended[top][keep], attended[3][keep])


def blocks_by_hand(q, k, v, length, log_scale, block, scale):
    """Block by block as in the paper, and how many blocks of V each group reads: (out, int64 [B, G])."""
    b, h, _, d = q.shape
    g, reads = k.shape[1], torch.zeros(len(q), k.shape[1], dtype=torch.long)
    out = torch.zeros(b, h, 1, d, dtype=torch.float64)
    limit = min(0.0, log_scale - math.log(length))
    for i in range(b):
        for group in range(g):
            heads = range(group * (h // g), (group + 1) * (h // g))
            highest = {head: -math.inf for head in heads}
            mass, total = dict.fromkeys(heads, 0.0), dict.fromkeys(heads, torch.zeros(d).double())
            for first in range(0, length, block):
                here = slice(first, min(first + block, length))
                scores = {head: k[i, group, here].double() @ q[i, head, 0].double() * scale for head in heads}
                for head in heads:
                    highest[head] = max(highest[head], scores[head].max().item())
                if all(scores[head].max().item() - highest[head] < limit for head in heads):
                    continue
                reads[i, group] += 1
                for head in heads:
                    p = scores[head].exp()
                    mass[head] += p.sum()
                    total[head] = total[head] + p @ v[i, group, here].double()
            for head in heads:
                out[i, head, 0] = total[head] / mass[head]
    return out, reads


@pytest.mark.parametrize(("h", "g"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("length", [16, 60])
def test_blocks_below_the_threshold_are_skipped(h, g, length):
    torch.manual_seed(1)
    q, k, v = inputs(2, h, g, 64, 16)
    seen = set()
    for log_scale in (-20.0, math.log(length) - 1.0, 50.0):
        want, reads = blocks_by_hand(q, k, v, length, log_scale, 16, 0.5)
        seen.add(reads.sum().item())
        args = (log_scale, 16, 0.5)
        assert error(kernels.skip_softmax(q, k, v, torch.tensor(length), *args), want) <= 1e-6
        if INTERPRETED:
            for splits in (1, 4):
                assert error(kc.skip_softmax(q, k, v, length, *args, splits=splits), want) <= 1e-5
            assert error(kc.skip_softmax(q, k, v, torch.tensor(length), *args), want) <= 1e-5
    if length > 16:
        assert len(seen) == 3, "nothing, something and all but the peaks were skipped"
    dense = reference.decode_attention(q, k, v, torch.tensor(length), None, "exclude", 0.5)
    assert error(reference.skip_softmax(q, k, v, torch.tensor(length), -20.0, 16, 0.5), dense) <= 1e-6


def tiny(kv_heads=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(3 if p.dim() > 1 else 1)
    return view_of(model)


@torch.no_grad()
def decoded(view, steps=2):
    """Logits of the last prompt token and of steps after it, [3, 1 + steps, vocabulary]."""
    cache = StaticCache(config=view.model.config, max_cache_len=9 + steps)
    out = view.model(torch.arange(27).view(3, 9), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    seen = [out]
    for _ in range(steps):
        out = view.model(out.argmax(-1), past_key_values=cache, use_cache=True).logits
        seen.append(out)
    return torch.cat(seen, 1)


@interpreted
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_fused_batch_equals_masked_execution(kv_heads):
    from harness.execution.fused_batch import Router, batch_decode

    view = tiny(kv_heads)
    dense = decoded(view)
    routers = {1: Router(torch.randn(kv_heads, 64), torch.randn(kv_heads), kv_heads // 2)}

    def decide(layer, x, step):
        keep = torch.ones(*x.shape[:2], view.n_heads, dtype=torch.bool)
        if layer in routers:
            scores = x @ routers[layer].weight.T + routers[layer].bias
            best = scores.topk(routers[layer].top).indices
            groups = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
            keep = groups.repeat_interleave(view.group_size, -1)
        return keep | ~step.decode[..., None]

    with view.tracker.tracking(Policy("decode")), masked_heads.skipping(view, INPUT, decide, "mask_output"):
        masked = decoded(view)
    with batch_decode(view):
        assert error(decoded(view), dense) <= 1e-4
    with batch_decode(view, routers):
        assert error(decoded(view), masked) <= 1e-4
    assert error(masked, dense) > 1e-2, "the routers drop something"
    assert torch.equal(decoded(view), dense)


@interpreted
def test_what_the_latency_probe_checks_before_it_times_passes():
    """Thresholds in the fused step, and routed heads in the step of a batch, block by block against masks."""
    from harness.execution.block_check import check_blocks
    from harness.execution.check import KernelMismatchError
    from harness.execution.fused_batch import batch_decode
    from harness.execution.fused_step import fast_decode
    from harness.probes.latency.plans import static_thresholds

    view = tiny(4)
    text = Calibration(view, tokens(8, 64).remainder(32).split(4))
    prompt = torch.arange(18).view(2, 9)
    teal, polar = Teal(0.4), Polar(0.5, epochs=1)
    teals, polars = ([(method, method.fit(view, text))] for method in (teal, polar))
    limits = static_thresholds(view, teals)
    attach = lambda t: lambda: fast_decode(view, "columns", t)  # noqa: E731
    assert check_blocks(view, teals, Policy(), prompt[:1], attach(limits)) < 1e-4
    with pytest.raises(KernelMismatchError, match="block 0"):
        check_blocks(view, teals, Policy(), prompt[:1], attach({}))
    assert check_blocks(view, (), Policy(), prompt, lambda: batch_decode(view)) < 1e-4
    routers = polar.routers(view, polars[0][1])
    assert check_blocks(view, polars, Policy("decode"), prompt, lambda: batch_decode(view, routers)) < 1e-4
    with pytest.raises(KernelMismatchError, match="of blocks agree"):
        check_blocks(view, polars, Policy("decode"), prompt, lambda: batch_decode(view))


@starts_it
def test_in_the_interpreter():
    run_interpreted(__file__)
