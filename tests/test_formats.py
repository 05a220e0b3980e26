"""Quantised weights: their values, what methods and the ledger make of them, cells and their dense twins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from rich.console import Console

from harness.errors import ConfigError
from harness.execution.attach import attached, overhead
from harness.execution.check import check_kernels
from harness.execution.fused_check import check_fused
from harness.execution.fused_cpu import packed_weights
from harness.model.formats import GROUPS, Format
from harness.model.quantise import quantise
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.latency import low_bit
from harness.probes.sparsity import measure
from harness.results.collect import collect, dense_key, headline
from harness.results.store import Store
from harness.run.canonical import canonical
from harness.run.config import CellConfig, check
from harness.run.execute import run_all
from harness.run.overrides import composed, rewrite
from harness.run.scope import reached, to_native
from tests import tiny
from tests.matrix import CASES

THRESHOLDS = ("teal", "cats", "topk", "topp", "wina_threshold", "cett", "dejavu", "kv_skip_norm", "random")
REWRITING = ("larosa", "wina_transform", "rsparse")


def quantised(bits: int, family: str = "llama", group: int = 32) -> View:
    view = tiny.view(family)
    quantise(view, Format(bits, group))
    return view


def cell(*overrides: str) -> CellConfig:
    return check(composed(rewrite(["device=cpu", "dtype=float32", *overrides], multirun=False)))


def totals(view: View, methods: list, policy: Policy | None = None) -> dict[tuple[str, str], float]:
    rows = measure(view, methods, policy or Policy(), tiny.tokens(2, 32))
    keys = ("all", None)
    return {(r["site"], r["metric"]): r["value"] for r in rows if (r["step_phase"], r["layer"]) == keys}


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_is_its_code_times_its_groups_scale(bits: int, group: int) -> None:
    """Half a scale off at most, and a whole one where int4 has no +8; fp16 rounds the scale itself."""
    weight, half = torch.randn(24, 256), 2 ** (bits - 1)
    values = Format(bits, group).values(weight).double().unflatten(-1, (-1, group))
    exact = weight.double().unflatten(-1, (-1, group))
    scale = exact.abs().amax(-1, keepdim=True) / (8 if bits == 4 else 127)
    codes = values / scale
    assert (codes - codes.round()).abs().max() < half * 2**-10 and codes.round().unique().numel() > half
    off = (values - exact).abs() / scale
    assert off.max() <= (1.01 if bits == 4 else 0.57) and (off > 0.51).double().mean() < 0.07


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
def test_groups_of_32_are_the_types_of_llama_cpp(bits: int, kind: str) -> None:
    weight = torch.randn(48, 256)
    stored = quants.quantize(weight.numpy(), GGMLQuantizationType[kind])
    assert stored.nbytes == Format(bits, 32).bytes(weight.numel(), weight.numel() / 32)
    wanted = quants.dequantize(stored, GGMLQuantizationType[kind])
    assert torch.equal(Format(bits, 32).values(weight), torch.from_numpy(wanted))


def test_a_group_of_zeros_stays_zero() -> None:
    assert not Format(4, 32).values(torch.zeros(3, 64)).any()


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "falcon", "mixtral"])
def test_all_projections_and_nothing_else_are_quantised(family: str) -> None:
    plain, view = tiny.view(family), quantised(4, family)
    inside = {id(module.weight) for block in view.blocks for _, module in block.projections()}
    for (name, before), after in zip(plain.model.named_parameters(), view.model.parameters(), strict=True):
        if id(after) in inside:
            matrices = before if before.dim() == 3 else before[None]
            wanted = torch.stack([Format(4, 32).values(matrix) for matrix in matrices]).view_as(before)
            assert torch.equal(after, wanted) and not torch.equal(after, before), name
        else:
            assert torch.equal(after, before), name
    assert view.weight_format == "int4-g32"


def test_a_group_that_does_not_divide_the_inputs_is_one_sentence() -> None:
    view = tiny.view("llama")
    before = view.blocks[0].q.weight.clone()
    with pytest.raises(ConfigError, match=r"weight_group=128 does not divide the 64 inputs of q .*: take 32 or 64"):
        quantise(view, Format(4, 128))
    assert torch.equal(view.blocks[0].q.weight, before) and view.stored is None


# ------------------------------------------------------------------------------------ methods, bytes


@torch.no_grad()
@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_methods_run_on_quantised_weights_and_leave_them_as_they_were(name: str, bits: int) -> None:
    view, ids = quantised(bits), tiny.tokens(2, 24)
    method = CASES[name].make(0.5)
    state = method.fit(view, tiny.calibration(view)) if method.needs != "nothing" else {}
    dense = view.model(ids).logits
    with attached(view, [(method, state)], Policy(method.phases[0])):
        sparse = view.model(ids).logits
    assert torch.isfinite(sparse).all() and not torch.equal(sparse, dense)
    assert torch.equal(view.model(ids).logits, dense)


@pytest.mark.parametrize("name", ["teal", "cats", "dejavu"])
def test_kernels_equal_masks_on_quantised_weights(name: str) -> None:
    view = quantised(4)
    method = CASES[name].make(0.5)
    check_kernels(view, [(method, method.fit(view, tiny.calibration(view)))], tiny.tokens(1, 24))


@pytest.mark.parametrize("name", REWRITING)
def test_methods_that_rewrite_weights_refuse_quantised_ones(name: str) -> None:
    method = CASES[name].make(0.5)
    assert method.refusal(tiny.view("llama")) is None
    assert "int4-g32, and rewritten ones would no longer be" in (method.refusal(quantised(4)) or "")


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_are_those_of_codes_and_scales(bits: int) -> None:
    """A skipped input's codes are not read, but its scales are; a skipped neuron's rows go with theirs."""
    view = quantised(bits)
    weights = view.block_weights * view.n_layers * 64  # tokens
    dense = totals(view, [])
    assert dense["model", "total_bytes"] == weights * bits / 8 + weights / 32 * 2
    assert dense["model", "skipped_bytes"] == 0

    teal = CASES["teal"].make(0.5)
    found = totals(view, [(teal, teal.fit(view, tiny.calibration(view)))])
    assert found["model", "skipped_bytes"] == pytest.approx(found["model", "skipped_weights"] * bits / 8, rel=1e-6)
    assert found["model", "achieved"] == found["model", "skipped_bytes"] / found["model", "total_bytes"]
    assert found["model", "achieved"] < 0.95 * found["model", "skipped_weights"] / found["model", "total_weights"]


def test_bytes_of_neurons_go_with_their_rows_scales() -> None:
    """The gate is read whole, of up the kept rows; of down the kept columns, and scales that no other column needs."""
    view = quantised(4)
    cats = CASES["cats"].make(0.5)
    found = totals(view, [(cats, cats.fit(view, tiny.calibration(view)))])
    half = found["mlp", "skipped_weights"] / 2  # as much in up as in down
    assert found["mlp", "skipped_bytes"] == pytest.approx(half * (4 / 8 + 2 / 32) + half * 4 / 8, rel=1e-6)


def test_heads_take_whole_groups_along() -> None:
    """A head of 16 channels shares its scales in o with the next: they are saved where both are dropped."""
    view = quantised(4)
    keep = torch.zeros(2, 24, 4, dtype=torch.bool)
    keep[..., 0] = True
    with attached(view, [], Policy(), count=True) as ledger:
        assert ledger is not None
        with view.tracker.hint(torch.ones(2, 24, dtype=torch.bool), torch.zeros(2, 24, dtype=torch.bool)):
            handle = view.blocks[0].q.register_forward_hook(lambda *_: ledger.rows("heads", 0, keep))
            view.model(tiny.tokens(2, 24))
            handle.remove()
    per_token = view.weights("o") / 32
    assert ledger.scales[0, "o"].sum().item() == 48 * per_token / 2  # one of two groups of 32 channels
    assert ledger.scales[0, "q"].sum().item() == 48 * per_token / 4  # a quarter of the rows
    assert ledger.scales[1, "o"].sum().item() == 48 * per_token


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (4, 64)])
@pytest.mark.parametrize(("name", "requested"), [("teal", 0.5), ("cats", 0.3), ("topk", 0.3), ("griffin", 0.3)])
def test_a_share_of_the_model_is_one_of_stored_bytes(name: str, requested: float, bits: int, group: int) -> None:
    """Where columns are skipped their scales are read all the same, so more of the codes must go."""
    view = quantised(bits, group=group)
    method = CASES[name].make(requested)
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    native = to_native(view, fitted, requested)
    policy = Policy(method.phases[0])
    phase = "decode" if policy.phase == "decode" else "all"
    rows = measure(view, native, policy, tiny.tokens(8, 32))
    [found] = [
        r["value"]
        for r in rows
        if (r["metric"], r["site"], r["step_phase"], r["layer"]) == ("achieved", "model", phase, None)
    ]
    assert found == pytest.approx(requested, abs=0.015)
    plain = to_native(tiny.view("llama"), fitted, requested)
    assert native[0][0].sparsity > plain[0][0].sparsity


def test_what_deciding_reads_counts_as_16_bits_a_weight() -> None:
    view = quantised(4)
    prox = CASES["prox"].make(0.2)
    fitted = [(prox, prox.fit(view, tiny.calibration(view)))]
    own = sum(overhead(view, fitted).values()) * 2
    [(method, _)] = to_native(view, fitted, 0.1)
    stored = view.n_layers * view.block_weights * (4 / 8 + 2 / 32)
    assert reached(view, [method], method.sparsity) - own / stored == pytest.approx(0.1, abs=1e-6)


def test_whole_heads_take_their_scales_along() -> None:
    """Heads of 16 channels: two share a scale of o, while rows of q, k and v take their own along."""
    view = quantised(4)
    method = CASES["kv_skip_norm"].make(0.5)
    assert method.skips(view) == {"q", "k", "v", "o"}
    half = sum(map(view.weights, "qkv")) * 0.5 * (0.5 + 2 / 32) + view.weights("o") * (0.5 * 0.5 + 0.25 * 2 / 32)
    assert reached(view, [method], 0.5) == pytest.approx(half / (view.block_weights * (0.5 + 2 / 32)))


# ------------------------------------------------------------------------------------------- latency


@pytest.mark.parametrize("name", [None, "teal", "cats"])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_fused_step_runs_the_format_with_a_plain_head(name: str | None, bits: int) -> None:
    view, methods = quantised(bits), []
    if name is not None:
        method = CASES[name].make(0.5)
        methods = [(method, method.fit(view, tiny.calibration(view)))]
    if low_bit.no_step(view, methods):
        pytest.skip("no C++ kernels on this machine")
    packed = packed_weights(view, bits, methods, head=False)
    assert check_fused(view, methods, Policy(), tiny.tokens(1, 24), packed).part < 1e-3
    plan = low_bit.variants(view, methods, Policy(), tiny.tokens(1, 64))
    assert [variant.execution for variant in plan] == ["dense", "kernel"][: 1 + len(methods)]
    stored = view.block_weights * view.n_layers * (bits + 0.5) / 8
    assert all(stored <= (variant.block_bytes or 0) for variant in plan)


def test_where_no_kernel_reads_the_weights_latency_says_so() -> None:
    assert "no kernel reads the int4-g32 weights of tiny-gemma: the fused" in (
        low_bit.no_step(quantised(4, "gemma"), []) or ""
    )


# --------------------------------------------------------------------------------------------- cells


def test_the_format_is_a_part_of_the_cell_and_nothing_is_where_there_is_none() -> None:
    plain = cell()
    assert cell("model.weight_format=null").id == plain.id
    ids = [cell(f"model.weight_format={given}").id for given in ("int8", "int4")]
    ids += [cell("model.weight_format=int4", "model.weight_group=64").id]
    assert len({plain.id, *ids}) == 4
    assert cell("model.weight_format=int4", "model.weight_group=32").id == ids[1]
    assert cell("model.weight_format=int4").model_name == "smollm2-135m-int4-g32"
    assert canonical(cell("model.weight_format=int4").plain) == cell("model.weight_format=int4").plain


def test_the_dense_twin_of_a_quantised_cell_is_quantised() -> None:
    sparse = cell("model.weight_format=int4", "method=teal")
    dense = sparse.dense_cell()
    assert dense is not None and dense.id == cell("model.weight_format=int4", "method=dense").id
    assert dense_key(dense.plain) == dense_key(sparse.plain) != dense_key(cell("method=teal").plain)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["model.weight_format=int3"], "model.weight_format must be one of int8, int4, not 'int3'"),
        (
            ["model.weight_format=int4", "model.weight_group=31"],
            "model.weight_group must be one of 32, 64, 128, not 31",
        ),
        (["model.weight_group=32"], "model.weight_group is of quantised weights"),
    ],
)
def test_an_unknown_format_is_one_sentence(given: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        cell(*given)


def test_rows_carry_the_format_and_meet_their_own_dense_cell(tmp_path: Path, tiny_folder: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(300)))
    given = ["model=local", f"model.path={tiny_folder}", "probe.names=[quality,sparsity]", "tasks=none", "method=topk"]
    given += [f"probe.perplexity.path={text}", "probe.perplexity.window=64", "probe.perplexity.windows=2"]
    given += ["probe.perplexity.kl_windows=1", "probe.sparsity.windows=2", f"results={tmp_path}"]
    cells = [cell(*given, *more) for more in ([], ["model.weight_format=int4"])]
    store = Store(tmp_path / "results")
    run_all(cells, store, {"name": "none", "group": None}, Console(quiet=True))
    table = collect(store.root)
    lines = headline(table).set_index(["model", "method"])
    name, stored = tiny_folder.name, f"{tiny_folder.name}-int4-g32"
    assert lines.loc[(name, "topk"), "weight_format"] == "float32"
    assert lines.loc[(stored, "topk"), "weight_format"] == "int4-g32" == lines.loc[(stored, "dense"), "weight_format"]
    for model in (name, stored):
        assert lines.loc[(model, "topk"), "dense:perplexity"] == lines.loc[(model, "dense"), "perplexity"]
    assert lines.loc[(name, "dense"), "perplexity"] != lines.loc[(stored, "dense"), "perplexity"]
