"""The latency probe on tiny models: what is timed, how often, beside what. No test looks at how fast it was."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import kernels
from harness.claims.hardware import batch_slows
from harness.execution.attach import attached
from harness.execution.decode_loop import DecodeLoop
from harness.execution.layouts import own_gemv
from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.step import Policy
from harness.probes import latency
from harness.probes.latency import plans, reads, timing
from harness.probes.latency import rows as latency_rows
from harness.probes.latency.chained import no_chain
from harness.probes.latency.timing import Timing
from harness.results.collect import relate
from harness.results.rows import make_row, to_frame
from methods.combined import Combined
from methods.dense import Dense
from methods.griffin import Griffin
from methods.kv_skip import KvSkip
from methods.prox import Prox
from methods.random import Random
from methods.spon import Spon
from methods.teal import Teal
from tests import tiny
from tests.timed import CONFIG, executions, fitted_teal, planned


@pytest.fixture(scope="module")
def teal():
    return fitted_teal()


def test_a_kernel_method_is_timed_beside_its_fair_baselines(teal):
    view, fitted = teal
    kinds = [
        (v.execution, v.columns.get("variant"), v.columns.get("sparsity_requested")) for v in planned(view, fitted)
    ]
    assert kinds == [
        ("dense", None, None),
        ("dense", "tuned GEMV", None),
        ("kernel", None, 0.0),
        ("kernel", None, None),
        ("dense_slice", None, None),
    ]
    assert [v.execution for v in planned(view, fitted, "masked")] == ["dense", "dense", "masked"]
    assert [v.execution for v in planned(view, [(Dense(), {})])] == ["dense", "dense"]


def test_skipped_heads_are_timed_through_kernels_and_an_oracle_says_why_not():
    view = tiny.view("llama")
    timed = planned(view, [(KvSkip(0.5, select_by="random", unit="group"), {})])
    assert [v.execution for v in timed] == ["dense", "dense", "kernel", "kernel", "dense_slice"]
    assert 0.2 < timed[3].reads_cache < 0.35 and timed[3].reads < 1  # half of the groups, of which half have holes
    masked = planned(view, [(KvSkip(0.5, unit="group"), {})])
    assert [v.execution for v in masked] == ["dense", "dense", "masked"]
    assert "decides from outputs" in masked[2].columns["message"]


def test_every_variant_is_timed_in_every_round(teal, monkeypatch):
    view, fitted = teal
    order = []
    generate = timing.generate
    monkeypatch.setattr(timing, "generate", lambda *args: order.append(variants.index(args[3])) or generate(*args))
    kept: list[Timing] = []
    timed_rounds = latency_rows.timed_rounds

    def keeping(*args):
        made = timed_rounds(*args)
        kept.extend(made[0])
        return made

    monkeypatch.setattr(latency_rows, "timed_rounds", keeping)
    variants = planned(view, fitted)
    rows = latency.measure(view, variants, tiny.tokens(2, 64), CONFIG)
    assert order[:10] == [0, 1, 2, 3, 4, 1, 2, 3, 4, 0] and len(order) == (3 + 1) * len(variants), "and one warm-up"
    for one in kept:
        assert len(one.first) == len(one.rounds) == 3
        assert len(one.each) == 3 * (5 - 1), "iterations times (tokens - 1) intervals, no more"
    complete = [make_row(cell_id="c", **row) for row in rows]
    assert {r["unit"] for r in complete if r["metric"].startswith("tpot")} == {"s"}
    assert all(r["value"] > 0 for r in complete if r["metric"] != "disturbance"), "but that nobody disturbed it"


def test_a_batch_runs_through_kernels_up_to_16_and_then_says_so(teal):
    view, fitted = teal
    config = CONFIG | {"batch": [1, 2, 16, 17], "repeats": 1}
    rows = latency.measure(view, planned(view, fitted), tiny.tokens(2, 64), config)
    assert executions(rows, 1) == ["dense", "dense", "kernel", "kernel", "dense_slice"]
    assert executions(rows, 2) == executions(rows, 16) == ["dense", "dense", "kernel", "kernel", "masked"]
    assert executions(rows, 17) == ["dense", "dense", "masked", "masked", "masked"]
    said = [r["message"] for r in rows if r["metric"] == "tpot_median" and r["execution"] == "masked"]
    assert ["above batch 16:" in message for message in said] == [False, False, True, True, False]
    assert all("no kernel above batch" in message for message in said)
    assert all("no kernel" not in (r.get("message") or "") for r in rows if r["execution"] == "kernel")


def test_the_union_of_a_batch_is_counted_and_is_what_its_step_reads(teal):
    """A batch of one prompt repeated touches what one sequence does; of different ones more, and its bytes follow."""
    view, fitted = teal
    taken = frozenset(view.projection_names())
    prompt = tiny.tokens(4, 16)

    def union(p):
        return reads.union_read(view, fitted, Policy(), taken, p)

    one, n = union(prompt[:1])
    assert one == pytest.approx(0.5, abs=0.1) and n == 4
    assert union(prompt[:1].repeat(3, 1)) == (pytest.approx(one), 12)
    assert one < union(prompt[:2])[0] < union(prompt)[0] < 1
    partly = reads.union_read(view, fitted, Policy(), frozenset({"down"}), prompt[:1])[0]
    assert 1 > partly > one, "what no kernel takes is read whole"

    rows = latency.measure(view, planned(view, fitted), tiny.tokens(2, 64), CONFIG | {"batch": [1, 4], "repeats": 1})
    complete = [make_row(cell_id="c", **row) for row in rows]
    shares = {r["batch"]: r["value"] for r in complete if r["metric"] == "union_touched"}
    assert {r["execution"] for r in complete if r["metric"] == "union_touched"} == {"kernel"}
    assert shares[1] < shares[4] < 1
    asked = [r for r in rows if r["metric"] == "step_bytes" and r["batch"] == 4 and r["execution"] == "kernel"]
    assert [r["value"] for r in asked] == [
        reads.step_bytes(view, 1.0, 4, 16),
        pytest.approx(reads.step_bytes(view, shares[4], 4, 16)),
    ]


def test_a_batch_feeds_the_claim_about_batches(teal):
    """Its kernel rows stand beside those of batch 1; the repeats at 0 % do not count."""
    view, fitted = teal
    rows = latency.measure(
        view, planned(view, fitted), tiny.tokens(2, 64), CONFIG | {"batch": [1, 4, 17], "repeats": 1}
    )
    table = to_frame([make_row(**({"cell_id": "c", "sparsity_requested": 0.5} | row)) for row in rows])
    evidence = batch_slows(SimpleNamespace(rows=relate(table, {}), counted={"c"}))
    own = [r["value"] for r in rows if r["metric"] == "time_ratio" and r["execution"] == "kernel"]
    assert (evidence.values, evidence.reference) == ([own[1]], [own[3]])
    assert "at batch 4" in evidence.note, "17 rows are masked"


def test_a_batch_that_kernels_take_in_part_is_masked_and_says_which():
    view = tiny.view("llama")
    method = Griffin(0.5)
    rows = latency.measure(
        view,
        planned(view, [(method, {})], policy=Policy("decode")),
        tiny.tokens(2, 64),
        CONFIG | {"batch": [1, 2], "repeats": 1},
    )
    assert executions(rows, 1)[3] == "kernel" and executions(rows, 2)[2:] == ["kernel", "masked", "masked"]
    own = [r for r in rows if r["metric"] == "tpot_median" and r["batch"] == 2][3]
    assert "no kernel for a batch of gate, up; only down skip" in own["message"]
    whole = next(r for r in rows if r["metric"] == "step_bytes" and r["batch"] == 2 and r["execution"] == "dense")
    assert all(r["value"] == whole["value"] for r in rows if r["metric"] == "step_bytes" and r["batch"] == 2)


@pytest.mark.parametrize("batch", [2, 3])
def test_own_gemv_decodes_a_batch_as_masks_do(teal, batch):
    """What is captured on a GPU above batch 1: fixed thresholds through the batch kernel, in the module itself."""
    view, fitted = teal
    limits = plans.static_thresholds(view, fitted)
    prompt, tokens = tiny.tokens(batch, 16), tiny.tokens(batch, 4, seed=5)

    @torch.no_grad()
    def steps():
        out = view.model(prompt, use_cache=True)
        logits = []
        for token in tokens.split(1, 1):
            out = view.model(token, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
        return torch.cat(logits, 1)

    with attached(view, fitted, Policy("decode")):  # the prompt of own_gemv is dense
        masked = steps()
    with own_gemv(view, limits):
        torch.testing.assert_close(steps(), masked, rtol=1e-3, atol=1e-3)


def test_compiled_is_timed_beside_eager_and_compared_with_compiled(monkeypatch):
    """Four compiled variants of their own execution; nothing is compiled anew once the rounds have begun."""
    torch._dynamo.reset()  # what other tests compiled is not counted
    torch._dynamo.utils.counters.clear()
    view = tiny.view("llama", num_hidden_layers=1)
    fitted = [(Teal(0.5), Teal(0.5).fit(view, tiny.calibration(view)))]
    logits: dict[str, torch.Tensor] = {}
    compile_steps = timing.compile_steps

    def compile_and_note(view, timed, *args):
        compile_steps(view, timed, *args)
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        for variant in timed:
            with variant.attach():
                model = variant.decoder or view.model
                cache = StaticCache(config=model.config, max_cache_len=16 + 5)
                token = model(tiny.tokens(1, 16), past_key_values=cache).logits[:, -1:].argmax(-1)
                out = (variant.step or model)(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits[f"{variant.execution} {variant.columns}"] = out.logits

    made: list[int] = []
    monkeypatch.setattr(latency_rows, "compile_steps", compile_and_note)
    compiler = partial(torch.compile, backend="eager")  # traced whole; inductor is slow, and a test of its own
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda device: 1e9)
    variants = planned(view, fitted, compile=True)
    rows = latency.measure(view, variants, tiny.tokens(2, 64), CONFIG | {"batch": [1, 2], "repeats": 1})
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made[-1] == 3, "0 % and the method share one"
    for name, got in logits.items():  # the prompt of the eager kernel is sparse, that of the compiled one is not
        if name.startswith(("dense_compiled", "kernel_compiled {'sparsity")):
            torch.testing.assert_close(got, logits["dense {}"], rtol=1e-4, atol=1e-4)
    times = [r for r in rows if r["metric"] == "tpot_median"]
    kinds = [(r["execution"], r.get("variant"), r.get("sparsity_requested")) for r in times if r["batch"] == 1]
    assert kinds[5:] == [
        ("dense_compiled", None, None),
        ("dense_compiled", "tuned GEMV", None),
        ("kernel_compiled", None, 0.0),
        ("kernel_compiled", None, None),
    ]
    assert not [r for r in times if r["batch"] == 2 and r["execution"].endswith("_compiled")]
    assert {r["execution"] for r in rows if r["metric"] == "time_ratio_eager"} == {"dense_compiled", "kernel_compiled"}
    strongest = [r for r in rows if r["metric"] == "time_ratio" and r["execution"] == "dense_compiled"]
    assert 1.0 in [r["value"] for r in strongest], "the baseline of compiled steps is a compiled one"


def test_only_fixed_thresholds_are_compiled():
    view = tiny.view("llama")
    method = Random(0.5)
    made = planned(view, [(method, {})], compile=True)
    assert [v.execution for v in made].count("kernel_compiled") == 0
    assert ["not compiled" in v.columns.get("message", "") for v in made if v.execution == "kernel"] == [False, True]
    assert [v.execution for v in planned(view, [(Dense(), {})], compile=True)] == ["dense", "dense", "dense_compiled"]


@pytest.mark.slow
def test_inductor_decodes_what_eager_decodes():
    """The compiled step of the method, by torch's own compiler, against the eager one on the same weights."""
    view = tiny.view("llama", num_hidden_layers=1)
    fitted = [(Teal(0.5), Teal(0.5).fit(view, tiny.calibration(view)))]
    variant = planned(view, fitted, compile=True)[-1]
    prompt = tiny.tokens(1, 16)
    timing.compile_steps(view, [variant], prompt, 5)
    for _ in range(2):
        with torch.no_grad():
            cache = StaticCache(config=variant.decoder.config, max_cache_len=16 + 5)
            token = variant.decoder(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
            caches = [cache, copy.deepcopy(cache)]
            eager, fast = (
                step(token, past_key_values=c, use_cache=True, logits_to_keep=1).logits
                for step, c in zip((variant.decoder, variant.step), caches, strict=True)
            )
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4)


def test_kernel_decode_gives_the_masked_tokens(teal):
    """Greedy tokens of the timed run are those that masked execution produces (float32, tiny depth)."""
    view, fitted = teal
    prompt = tiny.tokens(1, 16)
    runs = {}
    for name, execution in (("kernel", "kernel"), ("masked", "masked")):
        variant = planned(view, fitted, execution)[3 if execution == "kernel" else 2]
        with torch.no_grad(), variant.attach():
            out = view.model(prompt, use_cache=True)
            logits = [out.logits[:, -1]]
            for token in tiny.tokens(1, 4, seed=5)[0]:
                out = view.model(token.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
                logits.append(out.logits[:, -1])
        runs[name] = torch.cat(logits)
    torch.testing.assert_close(runs["kernel"], runs["masked"], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_thresholds_are_timed_through_the_fused_step_on_a_gpu():
    """A CUDA graph of the fused step for every variant, checked against masks before."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)
    view = view_of(model)
    tokens = torch.randint(0, 32000, (4, 512), generator=torch.Generator().manual_seed(1))
    method = Teal(0.5)
    fitted = [(method, method.fit(view, Calibration(view, tokens.split(2))))]
    config = CONFIG | {"batch": [1, 2, 16], "context": [128], "new_tokens": 16, "repeats": 5}
    variants = latency.variants(view, fitted, Policy(), 0.5, config, tokens)
    chain = [] if no_chain(view) else ["chained"]
    assert [v.engine for v in variants] == ["eager", *["graph"] * 2, *chain, *["graph"] * 3, *chain]
    rows = latency.measure(view, variants, tokens, config)
    times = {
        (r["batch"], r["engine"], r["execution"], r.get("variant"), r.get("sparsity_requested")): r["value"]
        for r in rows
        if r["metric"] == "tpot_median"
    }
    print(times)
    assert len(times) == 18 + 2 * len(chain)
    for batch in config["batch"]:
        more = len(chain) if batch == 1 else 0
        assert executions(rows, batch) == ["dense"] * (4 + more) + ["kernel"] * (2 + more)


@pytest.mark.gpu
@pytest.mark.parametrize("method", [Griffin(0.5), Random(0.5)], ids=["griffin", "random"])
def test_what_decides_anew_is_timed_in_a_graph_on_a_gpu(method):
    view = tiny.view("llama", head_dim=16)
    view.model.to("cuda", torch.bfloat16)
    plan = planned(view, [(method, {})], phase="decode", context=[16], new_tokens=5)
    own = [variant for variant in plan if variant.execution in ("kernel", "dense_slice")]
    assert [variant.engine for variant in own] == ["graph"] * 3, own[1].columns["message"]
    rows = latency_rows.measure(view, plan, tiny.tokens(2, 96).to("cuda"), CONFIG | {"batch": [1, 2]})
    assert all(r["value"] > 0 for r in rows if r["metric"] == "tpot_median")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["combined", "spon"])
def test_constants_as_biases_are_timed_through_the_fused_steps_on_a_gpu(name):
    """What SPON and combined leave of a model: thresholds and biases. The dense steps are those of the model itself."""
    view = tiny.view("llama", head_dim=32)
    view.model.to("cuda", torch.bfloat16)
    if name == "combined":
        methods = [Combined(0.5, steps=2, batch=1)]
        fitted = [(methods[0], methods[0].fit(view, tiny.calibration(view)))]
    else:
        teal, spon = Teal(0.5), Spon(0.5, epochs=0)
        fitted = [(teal, teal.fit(view, tiny.calibration(view)))]
        with attached(view, fitted, Policy()):
            fitted = [(spon, spon.fit(view, tiny.calibration(view))), *fitted]
    plan = planned(view, fitted, context=[16], new_tokens=5)
    chain = [] if no_chain(view) else ["chained"]
    assert [variant.engine for variant in plan] == ["eager", *["graph"] * 2, *chain, *["graph"] * 3, *chain]
    own = [variant for variant in plan if variant.execution == "kernel"]
    for variant, what in zip(own[1:], ["fused step", "chained step"], strict=False):
        assert f"{what} equals masked within" in variant.columns["message"]
    rows = latency_rows.measure(view, plan, tiny.tokens(2, 96).to("cuda"), CONFIG)
    timed = [r["engine"] for r in rows if r["metric"] == "tpot_median" and r["execution"] == "kernel"]
    assert timed == ["graph"] * 2 + chain
    assert all(module.bias is None for block in view.blocks for _, module in block.projections())


@pytest.mark.gpu
@pytest.mark.parametrize("method", [Prox(0.5), Combined(0.3, bits=4, steps=2)], ids=["prox", "combined"])
def test_what_a_copy_chooses_is_timed_through_the_chained_step_on_a_gpu(method):
    """Beside the graph in which the module's own projections choose; both read the same."""
    view = tiny.view("llama", head_dim=32, hidden_size=128, intermediate_size=384)
    view.model.to("cuda", torch.bfloat16)
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    plan = planned(view, fitted, context=[16], new_tokens=5)
    chain = [] if no_chain(view) else ["chained"]
    own = [variant for variant in plan if variant.execution == "kernel"]
    assert [variant.engine for variant in own] == ["graph", "graph", *chain], own[1].columns["message"]
    assert len({variant.reads for variant in own[1:]}) == 1
    rows = latency_rows.measure(view, plan, tiny.tokens(2, 96).to("cuda"), CONFIG)
    timed = [r for r in rows if r["metric"] == "tpot_median" and r["engine"] == "chained"]
    assert [r["execution"] for r in timed] == ["dense", "kernel"] * len(chain)
    assert all("chained step equals masked within" in r["message"] for r in timed)


@pytest.mark.gpu
def test_a_qwen2_is_timed_through_the_chained_step_on_a_gpu():
    """Biases of its own on q, k and v: in the dense chained step and in that of a method.

    Of 512 channels one that a rounding moves across its threshold is little; of 64 it is a sixth of what a block adds.
    """
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    view = tiny.view("qwen2", **sizes)
    view.model.to("cuda", torch.bfloat16)
    assert view.blocks[0].q.bias is not None
    method = Teal(0.5)
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    engines = [variant.engine for variant in planned(view, fitted, context=[16], new_tokens=5)]
    assert engines.count("chained") == (0 if no_chain(view) else 2)


@pytest.mark.gpu
@torch.no_grad()
def test_a_captured_batch_decodes_what_masks_decode():
    """Fixed thresholds above batch 1 on a GPU: the module's own step in a CUDA graph, replayed."""
    view = tiny.view("llama")
    view.model.to("cuda")
    method = Teal(0.5)
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    limits = plans.static_thresholds(view, fitted)
    prompt = tiny.tokens(3, 16).to("cuda")

    def steps(captured):
        cache = StaticCache(config=view.model.config, max_cache_len=16 + 5)
        token = view.model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        loop = DecodeLoop(view, cache, token, graph=captured)
        return torch.cat([loop.step().clone() for _ in range(4)], 1)

    with attached(view, fitted, Policy("decode")):
        masked = steps(False)
    with own_gemv(view, limits):
        torch.testing.assert_close(steps(True), masked, rtol=1e-3, atol=1e-3)
