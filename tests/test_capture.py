"""What keeps a decode step out of a CUDA graph, and the step that none of it is in."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from harness.errors import UnsupportedError
from harness.execution import capture, kernel
from harness.execution.attach import attached
from harness.execution.capture import HostReadError, no_host_reads
from harness.execution.decode_loop import DecodeLoop
from harness.execution.frame import framed
from harness.execution.fused_step import no_fused_step
from harness.execution.kernel import kernel_execution
from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.step import Policy
from harness.probes.latency import plans
from methods.cats import Cats
from methods.griffin import Griffin
from methods.kv_skip import KvSkip
from methods.random import Random
from methods.teal import Teal
from methods.topp import TopK, TopP
from methods.wina import Wina
from tests import tiny
from tests.interpreter import error, gpu, interpreted, run_interpreted, starts_it
from tests.matrix import CASES

MASK = torch.tensor([True, False, True])


@starts_it
def test_in_the_interpreter():
    run_interpreted(__file__)


@starts_it
@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[MASK],
        lambda x: x.clone().index_put_((MASK,), torch.zeros(())),
        lambda x: x.masked_select(MASK),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: x.to("meta"),
    ],
    ids=["item", "bool", "nonzero", "index", "index_put", "masked_select", "repeats", "copy"],
)
def test_what_the_host_has_to_know_is_refused(read):
    x = torch.tensor([1.0, 0.0, 2.0])
    read(x)
    with no_host_reads(), pytest.raises(HostReadError, match="the host"):
        read(x)


@starts_it
def test_what_stays_on_the_device_passes():
    x = torch.tensor([1.0, 0.0, 2.0])
    with no_host_reads():
        y = torch.where(x > 0, x, 0).topk(2).values
        y = y.to(torch.float16).repeat_interleave(2)[torch.tensor([0, 3])]
        y.copy_(torch.ones(2))
    assert y.tolist() == [1, 1]


# Their attention asks the host what is in the cache, or the model runs again, backwards.
HOST = {"attribution", "kv_skip", "kv_skip_zeros", "kv_recompute", "kv_mask_output", "polar", "skip_softmax"}
UNTIMED = {"sirius"}  # cuts its cache back


@starts_it
@pytest.mark.parametrize("name", [n for n in CASES if "llama" in CASES[n].families and n not in UNTIMED])
def test_no_decision_of_a_decode_step_waits_for_the_device(name, monkeypatch):
    """Every method of the matrix, in kernel execution where it has kernels, with masks in the place of lists."""
    monkeypatch.setattr(kernel, "by_masks", lambda x: True)
    monkeypatch.setattr("kernels.cuda.row_gemv_mask", plain_rows, raising=False)
    view = tiny.view("llama")
    method = CASES[name].make(0.5)
    with view.tracker.tracking(Policy()):
        state = method.fit(view, tiny.calibration(view)) if method.needs != "nothing" else {}
    policy = Policy(method.phases[0])
    runs = kernel_execution if kernel.has_kernels(method) else attached
    prompt = tiny.tokens(1, 12)
    with torch.no_grad(), runs(view, [(method, state)], policy):
        cache = StaticCache(config=view.model.config, max_cache_len=13)
        view.model(prompt[:, :-1], past_key_values=cache, use_cache=True)
        loop = DecodeLoop(view, cache, prompt[:, -1:])
        waits = None
        try:
            with no_host_reads():
                loop.step()
        except HostReadError as found:
            waits = str(found)
    assert (waits is not None) == (name in HOST), waits


def plain_rows(x, w, keep, bias=None):
    return torch.where(keep, torch.nn.functional.linear(x, w, bias), 0)


@starts_it
def test_a_step_that_is_known_to_decode_decides_as_one_that_looks():
    """DecodeLoop tells methods what a step is; masks and logits are those of a step that asks its cache."""
    view = tiny.view("llama")
    prompt = tiny.tokens(2, 12)
    for method, policy in ((Griffin(0.5), Policy("decode")), (Random(0.5), Policy("all", 13)), (Wina(0.5), Policy())):
        logits = []
        for loop in (False, True):
            with torch.no_grad(), attached(view, [(method, {})], policy):
                cache = StaticCache(config=view.model.config, max_cache_len=16)
                token = view.model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                steps = DecodeLoop(view, cache, token) if loop else None
                for _ in range(3):
                    if steps is None:
                        out = view.model(token, past_key_values=cache, use_cache=True).logits
                        token = out.argmax(-1)
                    else:
                        out = steps.step().clone()
                logits.append(out)
        torch.testing.assert_close(logits[0], logits[1])


FRAMED = {"teal": Teal, "cats": Cats, "griffin": Griffin, "topk": TopK, "topp": TopP, "wina": Wina}


@interpreted
@pytest.mark.parametrize(("name", "batch"), [(None, 1), *((name, 1) for name in FRAMED), (None, 3), ("teal", 3)])
def test_a_frame_leaves_what_is_decided_and_computed(name, batch, monkeypatch):
    """The module with its projections and hooks between our norms and attention, against the module alone."""
    from kernels.cuda import row_gemv_mask

    called = []
    monkeypatch.setattr(kernel, "by_masks", lambda x: True)
    monkeypatch.setattr("kernels.cuda.row_gemv_mask", lambda *a: called.append(a) or row_gemv_mask(*a), raising=False)
    view = tiny.view("llama", hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)
    fitted = []
    if name is not None:
        method = FRAMED[name](0.5)
        fitted = [(method, method.fit(view, tiny.calibration(view)) if method.needs != "nothing" else {})]
    prompt = tiny.tokens(batch, 9)

    @torch.no_grad()
    def logits(frame):
        runs = kernel_execution(view, fitted, Policy()) if fitted else attached(view, [], Policy())
        with runs:
            cache = StaticCache(config=view.model.config, max_cache_len=12)
            token = view.model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            seen = []
            if frame:
                with framed(view):
                    loop = DecodeLoop(view, cache, token)
                    assert loop.shared, "the frame leaves counting to the loop"
                    seen = [loop.step().clone() for _ in range(2)]
            else:
                for _ in range(2):
                    seen.append(view.model(token, past_key_values=cache, use_cache=True).logits)
                    token = seen[-1].argmax(-1)
            return torch.cat(seen, 1)

    want = logits(frame=False)
    assert error(logits(frame=True), want) <= 1e-4
    assert bool(called) == (name in ("cats", "griffin")), "rows of gate and up by a mask"
    assert all("forward" not in block.attn.__dict__ for block in view.blocks)


@starts_it
def test_a_frame_is_of_llama_like_blocks_with_any_activation():
    with pytest.raises(UnsupportedError, match="opt"), framed(tiny.view("opt")):
        pass
    view = tiny.view("llama")
    with view.activation_swapped("another", [block.act for block in view.blocks]), framed(view):
        assert no_fused_step(view) == "no kernel for the activation 'another'"


@starts_it
def test_a_step_that_can_not_be_held_says_why(monkeypatch):
    """The plan on a GPU, with stand-ins: a check that fails, a wait, and neither."""
    view = tiny.view("llama")
    fitted = [(Random(0.5), {})]
    windows = tiny.tokens(2, 64)
    assert plans.frame_of(view, fitted, Policy(), windows) == (None, None), "on a CPU nothing is captured"
    monkeypatch.setattr(plans, "fits_frame", lambda view: True)
    monkeypatch.setattr(plans, "check_blocks", lambda *a: 1e-3)
    monkeypatch.setattr(plans, "not_captured", lambda *a: "the host waits")
    assert plans.frame_of(view, fitted, Policy(), windows) == (None, "launched by the host: the host waits")
    assert plans.frame_of(view, [(KvSkip(0.5, select_by="random", unit="group"), {})], Policy(), windows) == (
        None,
        None,
    )
    monkeypatch.setattr(plans, "not_captured", lambda *a: None)
    frame, said = plans.frame_of(view, fitted, Policy(), windows)
    assert frame is not None and "within 1.0e-03 by block" in said

    def wrong(*_):
        raise plans.KernelMismatchError("block 0 differs")

    monkeypatch.setattr(plans, "check_blocks", wrong)
    assert plans.frame_of(view, fitted, Policy(), windows)[1].endswith("in our norms and attention, block 0 differs")


@starts_it
def test_a_method_that_waits_is_found_by_trying(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", None)  # no graph is made where a look at the device is found before
    view = tiny.view("llama")
    said = capture.not_captured(view, lambda: kernel_execution(view, [(Random(0.5), {})], Policy()), tiny.tokens(1, 8))
    assert said is not None and "waits for what the device finds (nonzero)" in said
    monkeypatch.setattr(kernel, "by_masks", lambda x: True)
    monkeypatch.setattr("kernels.cuda.row_gemv_mask", plain_rows, raising=False)
    attach = lambda: kernel_execution(view, [(Griffin(0.5), {})], Policy("decode"))  # noqa: E731
    assert capture.not_captured(view, attach, tiny.tokens(1, 8)) is None


@gpu
@pytest.mark.parametrize("name", FRAMED)
def test_a_graph_replays_what_the_module_decides(name, monkeypatch):
    """On a GPU: the greedy tokens of a captured step, whose decisions change from token to token, and its logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    view = view_of(LlamaForCausalLM(config).to("cuda", torch.float16).eval().requires_grad_(False))
    text = torch.randint(0, 2048, (4, 128), generator=torch.Generator().manual_seed(1))
    method = FRAMED[name](0.5)
    state = method.fit(view, Calibration(view, text.split(2))) if method.needs != "nothing" else {}
    policy = Policy(method.phases[0])
    attach = plans.within(lambda: kernel_execution(view, [(method, state)], policy), lambda: framed(view))
    assert capture.not_captured(view, attach, text[:1].cuda()) is None
    runs = []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)  # sums in one order: no flips
    for graph in (False, True):
        with torch.no_grad(), attach():
            cache = StaticCache(config=config, max_cache_len=48)
            view.model(text[:1, :32].cuda(), past_key_values=cache, use_cache=True)
            loop, logits = DecodeLoop(view, cache, text[:1, 32:33].cuda(), graph=graph), []
            for token in text[0, 33:40]:
                logits.append(loop.step().float().cpu())
                loop.token.fill_(token)
            runs.append(torch.cat(logits))
    assert error(runs[1], runs[0]) <= 5e-3 and error(runs[0][1:], runs[0][:-1]) > 0.1
