"""Latency as rows: what ran, beside which dense run, and what a table makes of it."""

from __future__ import annotations

from contextlib import nullcontext

import pandas as pd
import pytest
import torch

import kernels
from harness.execution.attach import attached
from harness.execution.check import KernelMismatchError, NoKernelRanError, check_kernels
from harness.execution.layouts import own_gemv
from harness.execution.nest import fit_nest
from harness.model.step import Policy
from harness.probes.latency import batched, chained, plans, reads, timing
from harness.probes.latency import rows as latency_rows
from harness.probes.latency.timing import Timing
from harness.probes.latency.variants import Variant
from harness.results.collect import headline, relate, time_ratios
from harness.results.rows import make_row, to_frame, with_engine
from methods.combined import Combined
from methods.dense import Dense
from methods.griffin import Griffin
from methods.kv_skip import KvSkip
from methods.polar import Polar
from methods.prox import Prox
from methods.random import Random
from methods.rsparse import RSparse
from methods.scap import Scap
from methods.spon import Spon
from methods.teal import Teal
from methods.topp import TopP
from methods.wina import Wina
from tests import tiny
from tests.timed import CONFIG, fitted_teal, planned


@pytest.fixture(scope="module")
def teal():
    return fitted_teal()


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


def point(*runs):
    """A grid point: (execution, engine, tuned, seconds a step)."""
    variants, timings = [], []
    for execution, engine, tuned, seconds in runs:
        decoder = torch.nn.Linear(1, 1) if engine == "compiled" else None
        columns = {"variant": "tuned GEMV"} if tuned else {}
        variants.append(
            Variant(
                execution,
                columns=columns,
                captured=engine == "graph",
                fused=engine == "fused",
                chained=engine == "chained",
                decoder=decoder,
            )  # fmt: skip
        )
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


def test_a_fused_cpu_step_is_compared_with_the_fused_dense_one_and_with_the_eager_module():
    at = point(
        ("dense", "eager", False, 8.0),
        ("dense", "eager", True, 4.0),
        ("dense", "fused", False, 2.0),
        ("kernel", "eager", False, 3.0),
        ("kernel", "fused", False, 1.0),
    )
    assert ratios(at, 3) == {"time_ratio": 2 / 3, "time_ratio_engine": 4 / 3, "time_ratio_library": 8 / 3}
    assert ratios(at, 4) == {"time_ratio": 2.0, "time_ratio_engine": 2.0, "time_ratio_library": 8.0}


def test_the_time_to_the_first_token_says_how_the_prompt_ran(teal):
    view, fitted = teal
    said = {}
    for phase in ("all", "decode"):
        plan = planned(view, fitted, phase=phase, fused=True) + planned(view, fitted, "masked", phase=phase)[-1:]
        rows = latency_rows.measure(view, plan, tiny.tokens(2, 96), CONFIG | {"repeats": 1})
        first = [r for r in rows if r["metric"] == "ttft_median"]
        notes = [(r["message"] or "").partition("prompt ")[2].partition(";")[0] for r in first]
        said[phase] = [(r["execution"], r["engine"], note) for r, note in zip(first, notes, strict=True)]
        assert {r["step_phase"] for r in first} == {"prefill"}
    masked = "masked, every byte read"
    dense = [("dense", "eager", ""), ("dense", "eager", ""), ("dense", "fused", "")]
    rest = [("kernel", "eager", "dense"), ("kernel", "eager", masked), ("dense_slice", "eager", "dense")]
    assert said["all"] == [*dense, *rest, ("kernel", "fused", masked), ("masked", "eager", masked)]
    assert masked not in str(said["decode"])


def test_a_chained_step_is_compared_with_the_chained_dense_one_and_with_the_modules_graph():
    at = point(
        ("dense", "eager", False, 8.0),
        ("dense", "graph", False, 4.0),
        ("dense", "chained", True, 2.0),
        ("kernel", "graph", False, 1.6),
        ("kernel", "chained", False, 1.0),
    )
    assert ratios(at, 3) == {"time_ratio": 1.25, "time_ratio_engine": 2.5, "time_ratio_library": 2.5}
    assert ratios(at, 4) == {"time_ratio": 2.0, "time_ratio_engine": 2.0, "time_ratio_library": 4.0}


def test_the_chained_step_is_checked_then_timed_at_batch_1(teal, monkeypatch):
    """The choice of engines and the rows, with the eager module's kernels in the place of the chained launches."""
    view, fitted = teal
    asked = []

    def stand_in(view, thresholds, capacity, choices):
        asked.append((len(thresholds), capacity))
        return own_gemv(view, thresholds)

    monkeypatch.setattr(chained, "no_chain", lambda view: None)
    monkeypatch.setattr(chained, "chained_decode", stand_in)
    monkeypatch.setattr(plans, "fits_fused_step", lambda view: True)
    monkeypatch.setattr(plans, "fused", lambda view, linear, limits=None, expected=0.5: lambda: own_gemv(view, limits))
    monkeypatch.setattr(plans, "framed", lambda view: nullcontext())
    monkeypatch.setattr(plans, "dense_variants", lambda view: [Variant("dense"), Variant("dense", captured=True)])
    plan = planned(view, fitted)
    assert [(v.execution, v.engine) for v in plan] == [
        ("dense", "eager"), ("dense", "graph"), ("dense", "chained"),
        ("kernel", "graph"), ("kernel", "graph"), ("kernel", "chained"),
    ]  # fmt: skip
    assert dict.fromkeys(asked) == dict.fromkeys([(0, 65), (7 * view.n_layers, 65)]), "checked, for the longest cache"
    assert "fused step equals masked within" in plan[4].columns["message"]
    rows = latency_rows.measure(view, plan, tiny.tokens(2, 96), CONFIG | {"batch": [1, 2]})
    of = [r for r in rows if r.get("engine") == "chained" and r["metric"] == "tokens_per_second"]
    assert [(r["batch"], r["execution"]) for r in of] == [(1, "dense"), (1, "kernel")]
    assert all("chained step equals masked within" in r["message"] for r in of)

    monkeypatch.setattr(chained, "chained_decode", lambda view, thresholds, capacity, _: own_gemv(view, {}))
    with pytest.raises(KernelMismatchError, match="block 0"):
        planned(view, fitted)


@pytest.mark.parametrize("method", [Prox(0.5), Combined(0.1, bits=4, steps=0), Griffin(0.5)], ids=lambda m: m.name)
def test_what_a_copy_chooses_has_a_chained_step_beside_the_frame(method, monkeypatch):
    """The choice of engines, masked execution in the place of the chained launches; both kernels read the same."""
    view = tiny.view("llama")
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    chosen = []

    def stand_in(view, thresholds, capacity, choices):
        chosen.append(choices)
        return nullcontext() if choices is None else attached(view, fitted, Policy())

    monkeypatch.setattr(chained, "no_chain", lambda view: None)
    monkeypatch.setattr(chained, "chained_decode", stand_in)
    monkeypatch.setattr(plans, "fits_fused_step", lambda view: True)
    monkeypatch.setattr(plans, "dense_variants", lambda view: [Variant("dense")])
    plan = planned(view, fitted)
    own = [v for v in plan if v.execution == "kernel"]
    chains = method.name != "griffin"
    assert [v.engine for v in own] == ["eager", "eager"] + ["chained"] * chains
    assert [v.engine for v in plan if v.dense] == ["eager", "chained"]
    assert len({v.reads for v in own[1:]}) == 1
    assert len([each for each in chosen if each is not None and len(each) == view.n_layers]) == 2 * chains


@pytest.mark.parametrize("name", ["combined", "spon", "scap"])
def test_constants_as_biases_run_fused_and_what_hooks_in_the_frame(name, monkeypatch):
    """Thresholds in a model with rewritten biases, in the chained step too; hooks run in the frame."""
    view = tiny.view("llama")
    make = {
        "combined": [Combined(0.5, steps=2, batch=1)],
        "spon": [Spon(0.5, epochs=1), Teal(0.5)],
        "scap": [Scap(0.5)],
    }[name]
    fitted = fit_nest(view, make, lambda method, _: method.fit(view, tiny.calibration(view)))
    biases = [module.bias for block in view.blocks for _, module in block.projections()]

    def stand_in(view, linear, limits=None, expected=0.5):
        return lambda: own_gemv(view, limits)

    monkeypatch.setattr(chained, "no_chain", lambda view: None)
    monkeypatch.setattr(chained, "chained_decode", lambda view, thresholds, capacity, _: own_gemv(view, thresholds))
    monkeypatch.setattr(plans, "fits_fused_step", lambda view: True)
    monkeypatch.setattr(plans, "fits_frame", lambda view: True)
    monkeypatch.setattr(plans, "fused", stand_in)
    monkeypatch.setattr(plans, "framed", lambda view: nullcontext())
    monkeypatch.setattr(plans, "dense_variants", lambda view: [Variant("dense"), Variant("dense", captured=True)])
    own = [(v.engine, v.columns) for v in planned(view, fitted) if v.execution == "kernel"]
    assert [engine for engine, _ in own] == ["graph", "graph"] + (["chained"] if name != "scap" else [])
    step = "in our norms and attention it equals" if name == "scap" else "fused step equals"
    assert f"{step} masked within" in own[1][1]["message"]
    assert name == "scap" or "chained step equals masked within" in own[2][1]["message"]
    assert biases == [module.bias for block in view.blocks for _, module in block.projections()]
    if name != "scap":  # without the constants a block is another
        monkeypatch.setattr(plans, "rewritten", lambda *_: nullcontext())
        with pytest.raises(KernelMismatchError, match="block"):
            planned(view, fitted)


def test_routed_heads_of_a_batch_are_checked_then_timed(monkeypatch):
    """The choice and the rows, with masked execution in the place of the GPU's step; a dense one is found out."""
    view = tiny.view("llama", num_attention_heads=8, num_key_value_heads=8)
    method = Polar(0.5, dense_layers=0, epochs=1)
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    policy = Policy("decode")

    def stand_in(view, routers=None):
        assert routers is None or (sorted(routers) == list(range(view.n_layers)) and routers[0].top == 4)
        return nullcontext() if routers is None else attached(view, fitted, policy)

    monkeypatch.setattr(batched, "no_batch_step", lambda view: None)
    monkeypatch.setattr(batched, "batch_decode", stand_in)
    plan = planned(view, fitted, phase="decode")
    graphs = [v for v in plan if v.engine == "graph"]
    assert [(v.execution, v.columns.get("variant")) for v in graphs] == [("dense", "fused attention"), ("kernel", None)]
    rows = latency_rows.measure(view, graphs, tiny.tokens(2, 96), CONFIG | {"batch": [1, 3], "repeats": 1})
    sparse = [r for r in rows if r["execution"] == "kernel" and r["metric"] in ("kv_bytes", "step_bytes")]
    whole = [r for r in rows if r["execution"] == "dense" and r["metric"] in ("kv_bytes", "step_bytes")]
    assert {r["batch"] for r in sparse} == {1, 3} and "equals masked within" in sparse[0]["message"]
    assert all(ours["value"] < theirs["value"] for ours, theirs in zip(sparse, whole, strict=True))

    monkeypatch.setattr(batched, "batch_decode", lambda view, routers=None: nullcontext())
    with pytest.raises(KernelMismatchError, match="of blocks agree"):
        planned(view, fitted, phase="decode")


def test_the_fused_cpu_step_of_a_method_is_timed_at_batch_1(teal):
    view, fitted = teal
    plan = planned(view, fitted, fused=True)
    rows = latency_rows.measure(view, plan, tiny.tokens(2, 96), CONFIG | {"batch": [1, 2]})
    of = [r for r in rows if r.get("engine") == "fused" and r["metric"] == "tokens_per_second"]
    assert [(r["batch"], r["execution"]) for r in of] == [(1, "dense"), (1, "kernel")]
    assert "fused step equals masked" in of[1]["message"]


def test_every_cell_of_a_model_has_the_same_dense_baselines(teal):
    view, fitted = teal
    plans_of = (
        planned(view, fitted, fused=True),
        planned(view, fitted, "masked", fused=True),
        planned(view, [(Dense(), {})], fused=True),
        planned(view, [(KvSkip(0.5, unit="group"), {})], fused=True),
    )
    wanted = [("dense", "eager", {}), ("dense", "eager", {"variant": "tuned GEMV"}), ("dense", "fused", {})]
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


@pytest.mark.parametrize("turned", [False, True])
def test_nested_methods_at_one_site_both_decide_in_kernels_too(teal, turned):
    """The inner kernel stood in the outer one's place, and a check on inputs already zeroed could not see it."""
    view, fitted = teal
    nest = [(Random(0.5), {}), *fitted]
    check = check_kernels(view, nest[::-1] if turned else nest, tiny.tokens(1, 20))
    assert check.error <= 1e-6 and check.ran == set(view.projection_names())


def test_a_rule_that_decides_otherwise_from_what_it_left_is_checked_on_whole_inputs():
    """Top-p keeps a share of the sum, and of what it kept again only a share."""
    view = tiny.view("llama")
    method = TopP(0.5)
    assert check_kernels(view, [(method, method.fit(view, tiny.calibration(view)))], tiny.tokens(1, 20)).error <= 1e-6


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


def test_fixed_thresholds_are_those_of_methods_that_rewrite_nothing():
    """WINA rewrites the model for its transform alone; R-Sparse and SCAP always do, so the model is another."""
    view = tiny.view("llama")
    found = {}
    for name, method in {
        "teal": Teal(0.5), "wina": Wina(0.5, rule="threshold"), "rsparse": RSparse(0.5), "scap": Scap(0.5),
    }.items():  # fmt: skip
        fitted = [(method, method.fit(view, tiny.calibration(view)))]
        found[name] = plans.static_thresholds(view, fitted) is not None
    assert found == {"teal": True, "wina": True, "rsparse": False, "scap": False}
