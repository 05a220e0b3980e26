"""Each rival's rule on hand-made tensors, and what its paper promises of it on tiny models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from harness.errors import ConfigError, UnsupportedError
from harness.execution.attach import attached, overhead
from harness.model.selection import Mask, Thresholds, keep_mask
from harness.model.step import Policy
from harness.run.nest import incomplete
from harness.run.scope import to_native
from methods.cats import Cats
from methods.drelu import DRelu
from methods.larosa import LaRoSA, tilted
from methods.meangate import MeanGate
from methods.norms import column_norms, contribution_quantiles
from methods.oracle import Oracle
from methods.prox import Prox, copied
from methods.rotation import rotated
from methods.rsparse import RSparse, low_rank
from methods.scap import SITES, Scap
from methods.statistical_topk import StatisticalTopK, threshold
from methods.topp import MaxP, TopP
from methods.wina import Wina, bases
from tests import tiny

IDS = tiny.tokens(2, 32)


def wide_view(family: str = "llama", **changes):
    view = tiny.view(family, **changes)
    view.model.double()
    return view


@torch.no_grad()
def logits(view, *fitted, policy: Policy = Policy()):  # noqa: B008 (frozen)
    with attached(view, fitted, policy):
        return view.model(IDS, use_cache=False).logits


# --- WINA


def test_wina_takes_norms_over_outputs():
    """[out, in] = [[3, 0], [4, 1]]: the columns' norms are 5 and 1, so |x| = (1, 4) ranks the first channel first."""
    view = tiny.view("llama")
    view.blocks[0].o.weight.data.zero_()
    view.blocks[0].o.weight.data[:2, :2] = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    norm = column_norms(view)["o", 0]
    assert norm[:2].tolist() == pytest.approx([5.0, 1.0])
    method = Wina(0.5)
    x = torch.zeros(1, 1, view.channels("o"))
    x[..., :2] = torch.tensor([1.0, 4.0])
    kept = method.select(method.plan(view, {}), "attn_out", 0, x, None)["o"]
    assert kept.score[0, 0, :2].tolist() == pytest.approx([5.0, 4.0])


def test_wina_with_orthogonal_columns_keeps_what_errs_least():
    """Every other set of as many channels gives a larger output error (lemma 3.1)."""
    from itertools import combinations

    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(6, 6)).Q * torch.rand(6)
    x = torch.randn(6)
    error = {kept: (weight @ x - weight[:, kept] @ x[list(kept)]).norm().item() for kept in combinations(range(6), 3)}
    best = (x.abs() * weight.norm(dim=0)).topk(3).indices.sort().values
    assert min(error, key=error.get) == tuple(best.tolist())


def test_wina_with_equal_norms_is_magnitude():
    view = tiny.view("llama")
    for block in view.blocks:
        for _, module in block.projections():
            module.weight.data = F.normalize(module.weight.data, dim=0)
    method = Wina(0.5)
    x = torch.randn(2, 3, view.d_model, generator=torch.Generator().manual_seed(0))
    found = method.select(method.plan(view, {}), "mlp_in", 1, x, None)["up"]
    top = x.abs().topk(view.d_model // 2, dim=-1).indices
    assert keep_mask(found, x).gather(-1, top).all() and keep_mask(found, x).sum() == top.numel()


def test_winas_transform_makes_columns_orthogonal():
    view = wide_view()
    state = bases(view)
    with rotated(view, {key.removeprefix("basis."): value for key, value in state.items()}):
        for block in view.blocks:
            for module in (block.k, block.gate):
                gram = module.weight.T @ module.weight
                assert (gram - gram.diag().diag()).norm() < 1e-5 * gram.norm()


def test_winas_pooled_threshold_is_the_rule_called_oracle():
    """Norms need no data and no look ahead: both are one rule, and neither is a bound on what a choice can reach."""
    view = tiny.view("llama")
    calibration = tiny.calibration(view)
    wina, oracle = Wina(0.5, rule="threshold"), Oracle(0.5)
    a, b = (logits(view, (m, m.fit(view, calibration))) for m in (wina, oracle))
    assert torch.equal(a, b)
    assert not oracle.oracle, "it reads nothing that a deployed method could not"
    a, b = (logits(view, (m, m.fit(view, calibration))) for m in (Wina(0.5), Oracle(0.5, budget="token")))
    assert torch.equal(a, b)


# --- rotations


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["wina", "pca", "random"])
def test_a_rotation_leaves_the_dense_function_unchanged(family, kind):
    view = wide_view(family)
    if kind == "wina":
        found = {key.removeprefix("basis."): value for key, value in bases(view).items()}
    else:
        state = LaRoSA(0.5, rotation=kind).fit(view, tiny.calibration(view))
        found = dict.fromkeys(("attn_in", "mlp_in"), state["basis"])
    dense = logits(view)
    with rotated(view, found):
        assert not torch.equal(logits(view), dense)
        torch.testing.assert_close(logits(view), dense, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(view), dense)


def test_larosas_first_axes_hold_most_of_the_input():
    view = tiny.view("llama")
    calibration = tiny.calibration(view)
    basis = LaRoSA(0.5).fit(view, calibration)["basis"]
    seen: list[torch.Tensor] = []
    with rotated(view, {"attn_in": basis}):
        calibration.visit({"attn_in": lambda layer, x: seen.append(x.flatten(0, 1)) if layer == 1 else None})
    power = torch.cat(seen).square().mean(0)
    assert (power[:-1] >= power[1:] - 1e-4 * power[0]).all() and power.mean().item() == pytest.approx(1, rel=1e-3)


def test_larosas_levels_come_to_the_request_by_weights():
    weights = {"attn_in": 3, "attn_out": 3, "mlp_in": 8, "mlp_hidden": 4}
    for sparsity in (0.25, 0.5, 0.8, 0.9):
        levels = tilted(weights, sparsity, 0.2)
        assert sum(weights[s] * levels[s] for s in weights) / 18 == pytest.approx(sparsity)
        assert levels["attn_out"] >= levels["mlp_in"] and max(levels.values()) <= 0.98
    assert tilted(weights, 0.5, 0.2)["mlp_hidden"] / tilted(weights, 0.5, 0.2)["mlp_in"] == pytest.approx(1.2 / 0.8)
    assert set(tilted(weights, 0.5, 0.0).values()) == {0.5}


@pytest.mark.parametrize(
    ("method", "products"), [(LaRoSA(0.5), 1), (LaRoSA(0.5, rotation="none"), 0), (Wina(0.5, transform=True), 2)]
)
def test_adapters_are_charged(method, products):
    """A model-wide request asks more of the channels, so that what is saved is saved after the adapters are paid."""
    view = tiny.view("llama")
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    cost = products * view.n_layers * view.d_model**2
    assert sum(overhead(view, fitted).values()) == cost
    share = cost / (view.n_layers * view.block_weights)
    assert to_native(view, fitted, 0.3)[0][0].sparsity == pytest.approx(0.3 + share)


def test_norms_with_biases_are_not_rotated():
    assert "folds into the weights" in LaRoSA(0.5).unsupported(tiny.view("opt"))
    assert Wina(0.5).unsupported(tiny.view("opt")) is None


# --- R-Sparse


def test_rsparse_at_rank_0_is_a_threshold_and_at_full_rank_dense():
    view = wide_view()
    calibration = tiny.calibration(view)
    bare, full = RSparse(0.5, remainder=0.0), RSparse(0.5, remainder=2.0)
    state = bare.fit(view, calibration)
    assert not any("." in key and not key.endswith(".norm") for key in state)
    assert torch.equal(
        logits(view, (bare, state)), logits(view, (Oracle(0.5), contribution_quantiles(view, calibration)))
    )
    torch.testing.assert_close(logits(view, (full, full.fit(view, calibration))), logits(view), rtol=1e-4, atol=1e-4)


def test_rsparse_adds_the_low_rank_product_of_what_was_dropped():
    torch.manual_seed(0)
    weight, x = torch.randn(8, 10), torch.randn(10)
    left, right = low_rank(weight, 3)
    kept = x.abs() > 0.5
    by_definition = weight @ torch.where(kept, x, 0) + left @ (right @ torch.where(kept, 0, x))
    as_run = (weight - left @ right) @ torch.where(kept, x, 0) + left @ (right @ x)
    torch.testing.assert_close(by_definition, as_run)
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close((weight - left @ right).norm(), singular[3:].norm())


def test_rsparse_charges_what_its_rank_reads():
    view = tiny.view("llama")
    method = RSparse(0.5, remainder=0.1)
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    read = sum(overhead(view, fitted).values()) / (view.n_layers * view.block_weights)
    assert read == pytest.approx(0.1, abs=0.01)  # a rank is a whole number


def test_rsparse_keeps_the_start_of_a_prompt_dense_where_asked():
    view = tiny.view("llama")
    method = RSparse(0.5, remainder=0.0, dense_prompt=0.5)
    state = method.fit(view, tiny.calibration(view))
    sparse, dense = logits(view, (method, state)), logits(view)
    torch.testing.assert_close(sparse[:, :16], dense[:, :16])
    assert not torch.allclose(sparse[:, 16:], dense[:, 16:])
    assert method.variant() == "remainder=0.0,dense_prompt=0.5"


# --- top-p, max-p


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    x = torch.tensor([[0.1, -5.0, 2.0, 3.0]])  # shares of the sum 10.1: .01, .495, .198, .297
    rule = TopP(0.5)
    assert rule.keep(x, 0.49).tolist() == [[False, True, False, False]]
    assert rule.keep(x, 0.5).tolist() == [[False, True, False, True]]
    assert rule.keep(x, 0.95).tolist() == [[False, True, True, True]]
    assert rule.keep(x, 1.0).all()
    assert TopP(0.5, power=2.0).keep(x, 0.6).tolist() == [[False, True, False, False]]  # 25 of 38


def test_max_p_is_relative_to_each_tokens_maximum():
    x = torch.tensor([[1.0, -10.0, 5.0], [1.0, 0.1, 0.5]])
    assert MaxP(0.5).keep(x, 0.5).tolist() == [[False, True, True], [True, False, True]]


@pytest.mark.parametrize("rule", [TopP(0.5), TopP(0.5, power=2.0), MaxP(0.5)])
def test_counts_agree_with_what_is_kept(rule):
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) ** 3
    p = rule.grid().float()
    counted = rule.counts(x, p).tolist()
    for place in (1, 100, 256, 400, 511):
        assert counted[place] == pytest.approx(rule.keep(x, p[place].item()).sum().item(), abs=2)


# --- statistical top-k


def test_statistical_threshold_is_mean_plus_quantile_deviations():
    a = torch.tensor([[1.0, 2.0, 3.0, 6.0]])  # mean 3, population deviation sqrt(3.5)
    assert threshold(a, 1.0).item() == pytest.approx(3 + 3.5**0.5)
    a = torch.randn(8, 20000, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for sparsity, quantile in ((0.5, 0.0), (0.9, 1.2816)):
        assert (a <= threshold(a, quantile)).double().mean().item() == pytest.approx(sparsity, abs=0.005)


@pytest.mark.parametrize("shift", [True, False])
def test_statistical_topk_is_gemmas_rule(shift):
    view = wide_view()
    method = StatisticalTopK(0.8, shift=shift)
    a = torch.randn(2, 5, view.d_ff, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cut = a.mean(-1, keepdim=True) + a.std(-1, correction=0, keepdim=True) * 0.8416212
    expected = F.silu(F.relu(a - cut)) if shift else torch.where(a > cut, F.silu(a), 0)
    with method.rewrite(view, {}):
        torch.testing.assert_close(view.blocks[0].act(a), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "olmo2", "mixtral", "olmoe"])
def test_statistical_topk_drops_by_the_gates_of_any_family_and_leaves_dense_tokens_alone(family):
    """What down reads of a sparse token: in a mixture of experts by the neurons of all that it is routed to."""
    view = wide_view(family)
    block, seen = view.blocks[0], {}
    decode = torch.zeros_like(IDS, dtype=torch.bool)
    decode[:, 20:] = True
    hooks = [
        block.gate.register_forward_hook(lambda _m, _a, out: seen.__setitem__("gate", out)),
        block.up.register_forward_hook(lambda _m, _a, out: seen.__setitem__("up", out)),
    ]
    with attached(view, [(StatisticalTopK(0.6), {})], Policy("decode")):
        hooks.append(block.down.register_forward_pre_hook(lambda _m, args: seen.__setitem__("down", args[0])))
        with view.tracker.hint(torch.ones_like(decode), decode):
            view.model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    gate, up, down = (seen[name].view(*IDS.shape, -1) for name in ("gate", "up", "down"))
    whole = block.act(gate) * up
    kept = gate > gate.mean(-1, keepdim=True) + gate.std(-1, correction=0, keepdim=True) * 0.2533471
    torch.testing.assert_close(down, torch.where(decode[..., None] & ~kept, 0, whole))


@pytest.mark.parametrize(
    ("method", "family", "sentence"),
    [
        (StatisticalTopK(0.5), "opt", "statistical_topk decides from the gate, and the MLP of tiny-opt has none"),
        (MeanGate(0.5), "falcon", "meangate takes the mean of the gate, and the MLP of tiny-falcon has none"),
        (MeanGate(0.5), "mixtral", tiny.view("mixtral").limits["neurons"]),
    ],
)
def test_rules_of_the_gate_say_where_they_mean_nothing(method, family, sentence):
    assert method.refusal(tiny.view(family)).endswith(sentence)


# --- Prox


def test_prox_with_an_exact_copy_is_the_gate_oracle():
    """It keeps what the true act(g) u would keep, and nothing else."""
    view = wide_view()
    method = Prox(0.5, bits=16, input_sparsity=0.0)
    state = method.fit(view, tiny.calibration(view))
    plan = method.plan(view, state)
    x = torch.randn(2, 7, view.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer, block in enumerate(view.blocks):
            true = (F.silu(block.gate(x)) * block.up(x)).abs()
            found = method.select(plan, "neurons", layer, x, None)
            assert isinstance(found, Mask) and torch.equal(found.keep, true > plan[layer][1])


def test_a_copy_holds_whole_multiples_of_a_scale_a_row():
    weight = torch.tensor([[0.7, -0.32, 0.06], [70.0, -32.0, 6.0]])
    torch.testing.assert_close(copied(weight, 4).values, torch.tensor([[0.7, -0.3, 0.1], [70.0, -30.0, 10.0]]))
    assert copied(weight, 16).values is weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_reads_the_copy_as_few_bits(bits, dtype):
    """The product that decides for one token, from codes, against the values that they stand for, in float64."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((200, 96), (200,)))
    x = torch.randn(1, 1, 96, generator=generator).to(dtype)
    copy = copied(weight, bits)
    assert copy.codes is not None and torch.equal(copy.codes.values().round(), copy.codes.values())
    torch.testing.assert_close((copy.codes.values().t() * copy.scale[:, None]).to(dtype), copy.values)
    assert copy.codes.line_bytes * 8 <= 256 * bits + 8 * 64 * 2, "padded to cache lines, with a scale for 32 codes"
    for cut in (-1.0, 0.5, 100.0):
        kept = torch.where(x.abs() > cut, x, 0).double()
        expected = kept @ copy.values.double().t() + bias.double()
        found = copy.product(x, cut, bias)
        together = copy.product(x.repeat(2, 1, 1), cut, bias)[:1]  # as a batch is decided: by the values
        assert found.dtype == together.dtype == dtype
        for way in (found, together):
            off = (way.double() - expected).norm() / expected.norm()
            assert off <= (1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_a_token_is_decided_as_a_batch_is_but_for_neurons_on_the_cut():
    view = tiny.view("llama")
    method = Prox(0.5)
    plan = method.plan(view, method.fit(view, tiny.calibration(view)))
    x = torch.randn(40, 1, view.d_model, generator=torch.Generator().manual_seed(1))
    together = method.select(plan, "neurons", 0, x, None).keep
    alone = torch.cat([method.select(plan, "neurons", 0, row[None], None).keep for row in x])
    scores = method.score(plan, "neurons", 0, x, None)
    unlike = together != alone
    assert unlike.float().mean() < 1e-3 and 0.3 < alone.float().mean() < 0.7
    assert ((scores[unlike] / plan[0][1] - 1).abs() < 1e-3).all()


def test_proxs_copy_is_charged():
    view = tiny.view("llama")
    method = Prox(0.5, bits=4, input_sparsity=0.5)
    fitted = [(method, method.fit(view, tiny.calibration(view)))]
    both = view.weights("gate") + view.weights("up")
    assert overhead(view, fitted)["mlp"] == view.n_layers * (both / 8 + 2 * view.d_ff)


# --- mean gate


GATED = [pytest.param(f, {}, id=f) for f in tiny.FAMILIES if MeanGate(0.5).refusal(tiny.view(f)) is None]
BIASED = [pytest.param(f, {"mlp_bias": True}, id=f"{f}-biased") for f in ("llama", "smollm3")]


@torch.no_grad()
def mlp_outputs(view, *fitted, policy: Policy = Policy()):  # noqa: B008 (frozen)
    """What every down gives: [layers, ...]. Logits would come through norms in float32."""
    found = []
    with attached(view, fitted, policy):
        hooks = [block.down.register_forward_hook(lambda _m, _a, out: found.append(out)) for block in view.blocks]
        view.model(IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@pytest.mark.parametrize(("family", "changes"), [*GATED, *BIASED])
def test_the_mean_gate_is_the_dense_model_where_nothing_is_dropped(family, changes):
    """The first block to rounding in float64: those behind it read norms, which round to float32."""
    view = wide_view(family, **changes)
    method, cats = MeanGate(0.5), Cats(0.5)
    state = method.fit(view, tiny.calibration(view))
    assert all(mean.abs().max() > 0.01 for mean in state["mean"])
    assert (view.blocks[0].up.bias is not None) == bool(changes)
    dense = mlp_outputs(view)
    nothing = {"quantiles": torch.zeros(view.n_layers, 513)}
    for nest in ([(method, state)], [(method, state), (cats, nothing)]):
        found = mlp_outputs(view, *nest)
        torch.testing.assert_close(found[0], dense[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)
    kept = cats.fit(view, tiny.calibration(view))
    assert not torch.allclose(mlp_outputs(view, (method, state), (cats, kept)), dense, rtol=1e-2, atol=1e-3)


def test_all_gated_families_have_a_mean_gate():
    ungated = ("gpt_neox", "falcon", "opt")
    assert {param.id for param in GATED} == {*tiny.FAMILIES} - {*tiny.MIXTURES, *ungated}


def test_the_mean_gate_needs_an_up_half_that_is_linear():
    view = wide_view()
    method, drelu = MeanGate(0.5), DRelu()
    state, swapped = method.fit(view, tiny.calibration(view)), drelu.fit(view, tiny.calibration(view))
    with drelu.attach(view, swapped):
        assert "goes through a ReLU (drelu)" in method.refusal(view)
    with pytest.raises(UnsupportedError, match="needs an up half that is linear"):
        logits(view, (drelu, swapped), (method, state))
    assert method.refusal(view) is None


OTHERS = [MeanGate(0.5), RSparse(0.5), LaRoSA(0.5), Wina(0.5, transform=True)]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True}], ids=["plain", "biased"])
@pytest.mark.parametrize("other", OTHERS, ids=lambda method: method.name)
def test_a_shift_and_a_rewrite_leave_dense_tokens_alone_whoever_stands_outside(other, changes, inside):
    """SCAP moves inputs and folds what that changes into biases, while others rewrite weights and add to outputs."""
    view = wide_view(**changes)
    calibration, scap = tiny.calibration(view), Scap(0.5)
    moved = scap.fit(view, calibration) | {f"{site}.centre": torch.full((view.n_layers,), 0.5) for site in SITES}
    nest = [(scap, moved), (other, other.fit(view, calibration))]
    if inside and other.rotates:
        assert (
            incomplete([scap, other])
            == f"{other.name} turns the inputs that scap knows: put it outside, [{other.name},scap]"
        )
        return
    assert incomplete([m for m, _ in (nest if inside else nest[::-1])]) is None
    with torch.no_grad(), attached(view, nest if inside else nest[::-1], Policy("decode")):
        found = view.model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, logits(view), rtol=1e-5, atol=1e-6)
    assert not view.own_biases


@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True}], ids=["plain", "biased"])
def test_the_mean_gate_stands_in_for_dropped_neurons(changes):
    """With all neurons dropped the MLP gives down(m * up(x))."""
    view = wide_view(**changes)
    calibration = tiny.calibration(view)
    outer = MeanGate(0.5)
    state = outer.fit(view, calibration)
    x = torch.randn(3, view.d_model, dtype=torch.float64)
    block = view.blocks[0]
    mean = state["mean"][0].double()
    with torch.no_grad(), outer.attach(view, state):
        handle = block.down.register_forward_pre_hook(lambda _m, args: (torch.zeros_like(args[0]),))
        got = block.layer.mlp(x)
        handle.remove()
    torch.testing.assert_close(got, block.down(mean * block.up(x)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wina(0.5, rule="best"), "method.wina.rule"),
        (lambda: Wina(0.95, allocation="greedy"), "goes up to"),
        (lambda: LaRoSA(0.5, tilt=1.0), "method.larosa.tilt"),
        (lambda: RSparse(0.5, remainder=-0.1), "method.rsparse.remainder"),
        (lambda: TopP(0.5, at="heads"), "method.topp.at"),
        (lambda: TopP(0.5, power=0.0), "method.topp.power"),
        (lambda: StatisticalTopK(0.5, shift="yes"), "method.statistical_topk.shift"),
        (lambda: Prox(0.5, bits=1), "method.prox.bits"),
        (lambda: MeanGate(0.5, rank=-1), "method.meangate.rank"),
    ],
)
def test_bad_options_end_early(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_static_rules_give_kernels_thresholds():
    view = tiny.view("llama")
    for method in (Wina(0.5, rule="threshold"), RSparse(0.5)):
        plan = method.plan(view, method.fit(view, tiny.calibration(view)))
        assert all(isinstance(found, Thresholds) for found in plan.values())
