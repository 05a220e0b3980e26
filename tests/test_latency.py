"""The latency probe on tiny models: what is timed, how often, beside what. No test looks at how fast it was."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import kernels
from harness.claims.hardware import batch_slows
from harness.execution.attach import attached
from harness.execution.check import NoKernelRanError, check_kernels
from harness.execution.decode_loop import DecodeLoop
from harness.execution.layouts import own_gemv
from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.step import Policy
from harness.probes import latency
from harness.probes.latency import plans, reads, timing, watch
from harness.probes.latency import rows as latency_rows
from harness.probes.latency.timing import Sample, Timing
from harness.probes.latency.variants import Variant
from harness.results.collect import headline, relate, time_ratios
from harness.results.rows import make_row, to_frame, with_engine
from methods.dense import Dense
from methods.griffin import Griffin
from methods.kv_skip import KvSkip
from methods.random import Random
from methods.teal import Teal
from tests import tiny

CHOICE = {"execution": "auto", "compile": False}
CONFIG = CHOICE | {"batch": [1], "context": [16], "new_tokens": 5, "repeats": 3, "min_seconds": 0.0}


@pytest.fixture(scope="module")
def teal():
    view = tiny.view("llama")
    method = Teal(0.5)
    return view, [(method, method.fit(view, tiny.calibration(view)))]


def planned(view, fitted, execution="auto", phase="all", **options):
    config = CHOICE | {"execution": execution} | options
    return latency.variants(view, fitted, Policy(phase), 0.5, config, tiny.tokens(2, 96))


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
    assert timed[3].reads_cache == 0.0 and timed[3].reads < 1
    masked = planned(view, [(KvSkip(0.5, unit="group"), {})])
    assert [v.execution for v in masked] == ["dense", "dense", "masked"]
    assert "decides from outputs" in masked[2].columns["message"]


def test_every_variant_is_timed_in_every_round(teal, monkeypatch):
    view, fitted = teal
    order = []
    generate = timing.generate
    monkeypatch.setattr(timing, "generate", lambda *args: order.append(variants.index(args[-1])) or generate(*args))
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
    assert all(r["value"] > 0 for r in complete)


def executions(rows, batch):
    """In the order of the variants: dense, its tuned GEMV, the kernel at 0 %, the method, the slice."""
    return [r["execution"] for r in rows if r["metric"] == "tpot_median" and r["batch"] == batch]


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
    """Four compiled twins of their own execution; nothing is compiled anew once the rounds have begun."""
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


def test_roofline_counts_kept_weights_head_and_cache():
    view = tiny.view("llama")
    head = view.model.get_output_embeddings().weight.numel()
    blocks = view.block_weights * view.n_layers
    assert reads.step_bytes(view, 1.0, 1, 0) == 4 * (blocks + head)
    assert reads.step_bytes(view, 0.5, 2, 10) == 4 * (blocks / 2 + head + 2 * 2 * 10 * 2 * 16 * 3)


def cell(*runs) -> pd.DataFrame:
    """A cell's latency rows: (execution, variant, sparsity, seconds a token)."""
    rows = []
    for execution, variant, sparsity, seconds in runs:
        rows.append(
            make_row(
                cell_id="c",
                model="m",
                method="teal",
                phase="all",
                probe="latency",
                execution=execution,
                variant=variant,
                sparsity_requested=sparsity,
                metric="tpot_median",
                value=seconds,
                unit="s",
                n=9,
                batch=1,
                context=16,
            )  # fmt: skip
        )
    return relate(to_frame(rows), {})


def test_a_better_gemv_is_never_sold_as_sparsity():
    """The headline compares the method with the strongest dense run, and never shows its kernel at 0 % as it."""
    table = cell(
        ("dense", None, 0.5, 0.4),
        ("dense", "tuned GEMV", 0.5, 0.2),
        ("kernel", None, 0.0, 0.1),
        ("kernel", None, 0.5, 0.16),
    )
    line = headline(table).iloc[0]
    assert line["tpot_ms"] == pytest.approx(160)
    assert line["speedup"] == pytest.approx(0.2 / 0.16)


def test_eager_and_compiled_never_meet():
    """Neither a baseline nor a headline crosses over, whichever is faster."""
    table = cell(
        ("dense", None, 0.5, 0.4),
        ("kernel", None, 0.5, 0.2),
        ("dense_compiled", None, 0.5, 0.15),
        ("kernel_compiled", None, 0.0, 0.12),
        ("kernel_compiled", None, 0.5, 0.1),
    )
    speedup = dict(zip(zip(table["execution"], table["sparsity_requested"]), table["speedup"]))
    assert speedup["kernel", 0.5] == pytest.approx(2) and speedup["kernel_compiled", 0.5] == pytest.approx(1.5)
    line = headline(table).iloc[0]
    assert (line["execution"], line["tpot_ms"], line["speedup"]) == ("kernel", 200, pytest.approx(2))


def test_a_dense_cells_time_is_its_fastest():
    """Its rows tell the library's step and the tuned one; which comes first must not matter."""
    rows = cell(("dense", None, 0.0, 0.4), ("dense", "tuned GEMV", 0.0, 0.2)).assign(method="dense")
    assert headline(rows).iloc[0]["tpot_ms"] == pytest.approx(200)


def test_claims_compare_within_an_engine_and_take_older_cells_as_they_are():
    row = {"execution": "kernel", "value": 1.0, "batch": 1}
    rows = pd.DataFrame(
        [
            row | {"cell_id": "new", "metric": "time_ratio", "value": 0.3},
            row | {"cell_id": "new", "metric": "time_ratio_engine", "value": 1.2},
            row | {"cell_id": "old", "metric": "time_ratio", "value": 1.5},
            row | {"cell_id": "old", "metric": "tpot_median", "value": 0.1},
        ]
    )
    assert list(time_ratios(rows)["value"]) == [1.2, 1.5]


def test_a_table_from_before_engines_were_told_is_read():
    """On a GPU a cell ran in CUDA graphs, or it had an ideal slice beside its eager kernels."""

    def one(cell_id, execution, device="NVIDIA H100", **more):
        facts = {"metric": "tpot_median", "value": 1.0, "unit": "s", "n": 1, "probe": "latency", "batch": 1} | more
        return make_row(cell_id=cell_id, execution=execution, device=device, **facts)

    rows = [
        *(one("fused", "dense", variant=v) for v in (None, "tuned GEMV")),
        one("fused", "kernel"),
        *(one("module", "dense", variant=v) for v in (None, "tuned GEMV")),
        one("module", "dense_slice"),
        one("dense", "dense"),
        one("cpu", "dense", "cpu: a", variant="tuned GEMV"),
        one("cpu", "kernel_compiled", "cpu: a"),
        one("cpu", "dense", "cpu: a", metric="read_bandwidth", batch=None),
        one("cpu", "masked", "cpu: a", probe="quality"),
    ]
    read = with_engine(to_frame(rows).drop(columns="engine"))
    assert list(read.columns) == list(to_frame(rows).columns)
    expected = [*["graph"] * 3, *["eager"] * 5, "compiled", None, None]
    assert [None if pd.isna(e) else e for e in read["engine"]] == expected
    assert with_engine(read) is read


def test_masked_time_is_no_speedup():
    line = headline(cell(("dense", None, 0.5, 0.4), ("masked", None, 0.5, 0.1))).iloc[0]
    assert line["execution"] == "masked"
    assert pd.isna(line.get("speedup"))


# --- the clock, memory and others, with times that are made up


def test_each_round_begins_with_another_variant_and_pairs_all():
    """A variant that always follows another meets the same cache, the same heat. Rounds stay paired."""
    order: list[int] = []

    def runs(place):
        def once():
            order.append(place)
            return Sample(first=1.0, steps=[float(place + 1)] * 2)

        return once

    seen: list[int] = []
    timings = timing.interleave([runs(i) for i in range(3)], 3, 0.0, after_round=lambda: seen.append(len(order)))
    assert [order[i : i + 3] for i in range(0, len(order), 3)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
    assert seen == [6, 9, 12], "after every round but the warm-up"
    assert [t.rounds for t in timings] == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert timing.ratio(timings[2], timings[0]) == 3.0


def test_rounds_go_on_until_there_is_enough_time_to_decode():
    timings = timing.interleave([lambda: Sample(0.1, [0.5, 0.5])] * 2, repeats=2, min_seconds=4.5)
    assert [len(t.rounds) for t in timings] == [5, 5], "a second a round, five for 4.5 seconds"


def test_peak_memory_is_each_variants_own(teal, monkeypatch):
    """A counter that only rises, as a GPU's does, must be reset for each, once it is attached."""
    view, _ = teal
    peak = {"now": 0, "peak": 0}

    def attaches(size):
        @contextmanager
        def attach():
            peak["peak"] = max(peak["peak"], 10 * size)  # what laying out weights takes for a moment is not the step's
            peak["now"] = size
            yield

        return attach

    def decode(*args):
        peak["peak"] = max(peak["peak"], peak["now"])
        return 0.1, [0.1]

    monkeypatch.setattr(timing, "generate", decode)
    memory = watch.Memory("peak_memory", lambda: peak.update(peak=0), lambda: peak["peak"])
    variants = [Variant("dense", attaches(500)), Variant("kernel", attaches(200))]
    runs = [partial(timing.run, view, tiny.tokens(1, 4), 5, variant, memory) for variant in variants]
    assert [t.memory for t in timing.interleave(runs, 2, 0.0)] == [500, 200]


class Others:
    """Seconds that pass, and what others do meanwhile."""

    def __init__(self, unit, every, *seen):
        self.time, self.seen = 0.0, list(seen)
        self.watch = watch.Watch(lambda: self.seen.pop(0), unit, every, clock=lambda: self.time)

    def wait(self, seconds, at_once=False):
        self.time += seconds
        self.watch.look(at_once)


def test_who_comes_during_the_run_is_seen():
    others = Others("cores", 1.0, 0.0, 0.1, 1.3, 50.0)
    others.wait(0.5)
    others.wait(0.5)
    others.wait(2.0)
    others.wait(0.01, at_once=True)  # too short a look for clocks that tick: counted by its length, never the most
    assert [seen for _, seen in others.watch.looks] == [0.1, 1.3, 50.0]
    assert others.watch.most == 1.3
    assert others.watch.mean == pytest.approx((0.1 + 2 * 1.3 + 0.5) / 3.01)
    assert others.watch.words() == "other processes took 1.1 cores, at most 1.3"
    quiet = Others("cores", 1.0, 0.0, 0.2)
    quiet.wait(1.0)
    assert quiet.watch.words() is None
    gpu = Others("processes", 5.0, 0.0, 2.0, 0.0)
    gpu.wait(6.0)
    gpu.wait(1.0, at_once=True)
    assert gpu.watch.words() == "2 other processes on the GPU"
    before = Others("processes", 5.0, 1.0)
    assert before.watch.words() == "1 other processes on the GPU", "there when the run began"


def test_what_others_take_is_the_machines_time_less_our_own(monkeypatch):
    moments = iter([(0.0, 10.0, 1.0), (4.0, 16.0, 5.0)])
    monkeypatch.setattr(watch.CpuNeighbours, "_counters", lambda self: next(moments))
    assert watch.CpuNeighbours()() == pytest.approx((6.0 - 4.0) / 4.0)


def test_every_grid_point_has_a_row_about_others(teal, monkeypatch):
    view, fitted = teal
    monkeypatch.setattr(latency_rows, "watch", lambda device: watch.Watch(lambda: 1.5, "cores", every=0.0))
    rows = latency.measure(view, planned(view, fitted)[:1], tiny.tokens(2, 64), CONFIG | {"batch": [1, 2]})
    about = [make_row(cell_id="c", **r) for r in rows if r["metric"] == "disturbance"]
    assert [(r["batch"], r["value"], r["unit"]) for r in about] == [(1, 1.5, "cores"), (2, 1.5, "cores")]
    assert all("took 1.5 cores" in r["message"] for r in rows if r["metric"] == "tpot_median")


# --- one baseline for all, and what ran


def point(*runs):
    """A grid point: (execution, engine, tuned, seconds a step)."""
    variants, timings = [], []
    for execution, engine, tuned, seconds in runs:
        decoder = torch.nn.Linear(1, 1) if engine == "compiled" else None
        columns = {"variant": "tuned GEMV"} if tuned else {}
        variants.append(Variant(execution, columns=columns, captured=engine == "graph", decoder=decoder))
        timings.append(Timing([0.1], [seconds], [seconds]))
    return latency_rows.Point(1, 16, variants, timings, None, 1e9, "resident_memory")


def ratios(at, place):
    compared = latency_rows.baselines(at, at.variants[place])
    return {metric: timing.ratio(base, at.timings[place]) for metric, base in compared.items()}


def test_the_strongest_dense_run_is_everybodys_baseline_whatever_its_engine():
    """On a GPU a method that decides on the host is eager; the dense graph beside it is what it must beat."""
    at = point(
        ("dense", "eager", False, 8.0),
        ("dense", "eager", True, 6.0),
        ("dense", "graph", False, 2.0),
        ("dense", "graph", True, 1.0),
        ("kernel", "eager", False, 4.0),
        ("kernel", "graph", False, 0.5),
        ("dense_compiled", "compiled", False, 0.25),
        ("kernel_compiled", "compiled", False, 0.125),
    )
    assert ratios(at, 4) == {"time_ratio": 0.25, "time_ratio_engine": 1.5, "time_ratio_library": 2.0}
    assert ratios(at, 5) == {"time_ratio": 2.0, "time_ratio_engine": 2.0, "time_ratio_library": 4.0}
    compiled = {"time_ratio": 2.0, "time_ratio_engine": 2.0, "time_ratio_library": 2.0, "time_ratio_eager": 64.0}
    assert ratios(at, 7) == compiled


def test_every_cell_of_a_model_has_the_same_dense_baselines(teal):
    view, fitted = teal
    plans_of = (
        planned(view, fitted),
        planned(view, fitted, "masked"),
        planned(view, [(Dense(), {})]),
        planned(view, [(KvSkip(0.5, unit="group"), {})]),
    )
    wanted = [("dense", "eager", {}), ("dense", "eager", {"variant": "tuned GEMV"})]
    for plan in plans_of:
        assert [(v.execution, v.engine, v.columns) for v in plan if v.dense] == wanted


@pytest.fixture(params=["no compiler", "float16"])
def no_kernels(request, monkeypatch):
    """A model on a machine where torch's operators run in every kernel's place."""
    view = tiny.view("llama")
    method = Teal(0.5)
    state = method.fit(view, tiny.calibration(view))
    if request.param == "float16":
        view.model.half()
        return view, [(method, state)]
    monkeypatch.setattr("kernels.ops.cpu_extension", lambda: False)
    for name in ("column_gemv", "column_gemv_index", "dense_gemv", "dense_gemv_rows", "row_gemv_index"):
        monkeypatch.setattr(kernels, name, getattr(torch.ops.dynact, f"_torch_{name}").default)
    return view, [(method, state)]


def test_kernel_execution_is_never_written_where_no_kernel_ran(no_kernels):
    view, fitted = no_kernels
    with pytest.raises(NoKernelRanError, match="no kernel ran for teal: on this machine torch's own operators"):
        planned(view, fitted, "kernel")
    plan = planned(view, fitted, "auto")
    assert [v.execution for v in plan] == ["dense", "masked"], "no tuned GEMV either"
    assert "no kernel ran for teal" in plan[1].columns["message"]


def test_a_check_says_which_projections_a_kernel_computed(teal, monkeypatch):
    """One projection off the fast path is not counted among them."""
    view, fitted = teal
    right, off = kernels.column_gemv, torch.ops.dynact._torch_column_gemv.default

    def column_gemv(x, wt, t, bias=None):
        return (off if len(wt) == view.d_ff else right)(x, wt, t, bias)

    monkeypatch.setattr(kernels, "column_gemv", column_gemv)
    check = check_kernels(view, fitted, tiny.tokens(1, 20))
    assert check.masked == {"down"} and check.ran == {"q", "k", "v", "o", "gate", "up"}
    assert "no kernel for down" in planned(view, fitted)[3].columns["message"]


def test_the_ideal_slice_leaves_out_what_the_methods_own_sites_allow(monkeypatch):
    """A method that skips in the MLP is not compared with a slice of the attention."""
    view = tiny.view("llama")
    method = Griffin(0.5)
    timed = planned(view, [(method, {})], phase="decode")
    kernel, ceiling = timed[3], timed[4]
    assert ceiling.reads == pytest.approx(kernel.reads), "as many bytes as the method, without choosing them"
    read: list[int] = []
    dense = kernels.dense_gemv
    monkeypatch.setattr(kernels, "dense_gemv", lambda x, wt, b=None: read.append(len(wt)) or dense(x, wt, b))
    with ceiling.attach():
        for _, module in view.blocks[0].projections():
            module(torch.zeros(1, 1, module.in_features))
    names, whole = zip(*((name, module.in_features) for name, module in view.blocks[0].projections()))
    assert {n for n, part, all_ in zip(names, read, whole) if part < all_} == {"gate", "up", "down"}
    assert read[names.index("gate")] == pytest.approx(0.5 * whole[names.index("gate")], abs=2)
    assert reads.ideal_slice(view, [(method, {})], 0.0) == {}


def test_the_kernel_at_zero_reads_everything_also_where_a_relu_made_zeros():
    """What a zero channel's weights hold shows in the result: NaN if they are read."""
    view = tiny.view("llama")
    with torch.no_grad(), own_gemv(view, limits={}):
        down = view.blocks[0].down
        down.weight.data[:, 3] = torch.nan
        x = torch.ones(1, 1, view.d_ff)
        x[..., 3] = 0
        assert down(x).isnan().all()
        assert down(x.repeat(2, 1, 1)).isnan().all(), "a batch too"


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
    variants = latency.variants(view, fitted, Policy(), 0.5, CHOICE, tokens)
    assert [v.engine for v in variants] == ["eager", "eager", *["graph"] * 4]
    config = CONFIG | {"batch": [1, 2, 16], "context": [128], "new_tokens": 16, "repeats": 5}
    rows = latency.measure(view, variants, tokens, config)
    times = {
        (r["batch"], r["engine"], r["execution"], r.get("variant"), r.get("sparsity_requested")): r["value"]
        for r in rows
        if r["metric"] == "tpot_median"
    }
    print(times)
    assert len(times) == 18
    for batch in config["batch"]:
        assert executions(rows, batch) == ["dense", "dense", "dense", "dense", "kernel", "kernel"]


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
