"""CETT is the norm of the sum; CATS leaves the gate dense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import ConfigError
from harness.execution.attach import attached
from harness.model.step import Policy
from harness.model.view import View
from methods.cats import Cats
from methods.cett import Cett, column_norms, threshold_at, truncation_error
from tests import tiny


def llama() -> View:
    return tiny.view("llama")


def opt() -> View:
    return tiny.view("opt")


def test_cett_is_the_norm_of_the_sum_not_the_sum_of_norms() -> None:
    weight = torch.tensor([[1.0, -1.0, 10.0], [0.0, 0.0, 0.0]])
    hidden = torch.tensor([[1.0, 1.0, 1.0]])  # the two small neurons cancel
    assert truncation_error(hidden, weight, t=1.0).item() == 0.0
    one_of_them = truncation_error(torch.tensor([[1.0, 0.0, 1.0]]), weight, t=1.0)
    assert one_of_them.item() == pytest.approx(1 / 11)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 3.0))
def test_cett_is_at_most_the_sum_of_norms(seed: int, t: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, 24, generator=generator)
    weight = torch.randn(8, 24, generator=generator)
    sizes = hidden.abs() * column_norms(weight)
    bound = torch.where(sizes <= t, sizes, 0).sum(-1) / (hidden @ weight.T).norm(dim=-1)
    assert (truncation_error(hidden, weight, t) <= bound * 1.0001 + 1e-6).all()


def test_cett_of_nothing_is_zero_and_of_everything_is_one() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 24), torch.randn(8, 24)
    assert truncation_error(hidden, weight, -1.0).max() == 0
    torch.testing.assert_close(truncation_error(hidden, weight, 1e6), torch.ones(5))


@pytest.mark.parametrize("make", [llama, opt])
@pytest.mark.parametrize("wanted", [0.1, 0.2, 0.4])
def test_the_fitted_threshold_has_the_wanted_cett(make, wanted: float) -> None:
    view = make()
    data = tiny.calibration(view)
    method = Cett(cett=wanted, cett_tokens=512)
    state = method.fit(view, data)
    hidden = data.activations("mlp_hidden")["mlp_hidden"]
    for layer, block in enumerate(view.blocks):
        t = threshold_at(state["t"][layer], state["cett"][layer], wanted)
        measured = truncation_error(hidden[layer], block.down.weight, t).mean().item()
        assert measured == pytest.approx(wanted, abs=0.02)
        plan = method.plan(view, state)[layer]
        dropped = hidden[layer].abs() <= plan.t
        same = hidden[layer].abs() * column_norms(block.down.weight) <= t
        assert (dropped == same).float().mean() > 0.999  # only rounding at the edge may differ


def test_one_cett_fit_serves_every_cett_and_another_every_sparsity() -> None:
    assert Cett(cett=0.1, sparsity=0.3).fit_key() == Cett(cett=0.4).fit_key()
    assert Cett(sparsity=0.3).fit_key() == Cett(sparsity=0.7).fit_key() != Cett(cett=0.4).fit_key()
    view = llama()
    state = Cett(cett=0.1).fit(view, tiny.calibration(view))
    low, high = (Cett(cett=c).plan(view, state) for c in (0.1, 0.4))
    assert all((a.t < b.t).all() for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize(("make", "sparsity"), [(llama, 0.3), (llama, 0.7), (opt, 0.7)])
def test_cett_reaches_the_requested_sparsity_in_every_layer(make, sparsity: float) -> None:
    view = make()
    data = tiny.calibration(view)
    method = Cett(sparsity=sparsity)
    with attached(view, [(method, method.fit(view, data))], Policy(), count=True) as ledger:
        for batch in data.batches:
            view.model(batch, use_cache=False)
    for layer in range(view.n_layers):
        kept, total = ledger.kept[layer, "mlp_hidden"].sum(), ledger.total[layer, "mlp_hidden"].sum()
        # later layers see what earlier ones dropped; OPT's own zeros count at least half
        assert 1 - kept / total == pytest.approx(sparsity, abs=0.08)
    touched = sum(ledger.touched[layer, "down"].sum() for layer in range(view.n_layers))
    assert touched < ledger.tokens.sum() * view.weights("down") * view.n_layers * (1 - sparsity + 0.08)
    assert ledger.touched[0, "up"].sum() == ledger.tokens.sum() * view.weights("up")


def test_cats_leaves_the_gate_dense_and_skips_up_and_down() -> None:
    view = llama()
    data = tiny.calibration(view)
    method = Cats(sparsity=0.5)
    with attached(view, [(method, method.fit(view, data))], Policy(), count=True) as ledger:
        for batch in data.batches:
            view.model(batch, use_cache=False)
    tokens = ledger.tokens.sum().item()
    assert ledger.touched[0, "gate"].sum().item() == tokens * view.weights("gate")
    for projection in ("up", "down"):
        share = ledger.touched[0, projection].sum().item() / (tokens * view.weights(projection))
        assert share == pytest.approx(0.5, abs=0.02)


def test_cats_drops_by_the_activated_gate_alone() -> None:
    view = llama()
    method = Cats(sparsity=0.5)
    state = method.fit(view, tiny.calibration(view))
    t = method.plan(view, state)[0].t
    block, seen = view.blocks[0], {}
    with attached(view, [(method, state)], Policy()):
        block.act.register_forward_hook(lambda _m, _a, out: seen.update(gate=out))
        block.down.register_forward_pre_hook(lambda _m, args: seen.update(hidden=args[0]))
        view.model(torch.arange(20)[None], use_cache=False)
    assert ((seen["hidden"] == 0) == (seen["gate"].abs() <= t)).all()


def test_cats_needs_a_gate() -> None:
    assert "gate" in (Cats(sparsity=0.5).unsupported(opt()) or "")
    assert Cats(sparsity=0.5).unsupported(llama()) is None


@pytest.mark.parametrize("wrong", [0, 1, -0.1, 1.5])
def test_a_cett_outside_of_its_range_is_one_sentence(wrong: float) -> None:
    with pytest.raises(ConfigError, match="cett"):
        Cett(cett=wrong)
