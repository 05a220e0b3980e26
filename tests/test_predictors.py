"""DejaVu's predictors, LTE's routers, and the probe that judges them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import methods.dejavu
from harness.errors import ConfigError
from harness.execution.attach import attached
from harness.execution.ledger import Ledger
from harness.fitting.calibration import Calibration
from harness.fitting.contribution import Contributions
from harness.fitting.scratch import Scratch
from harness.model.sees import INPUT, OUTPUT, residual
from harness.model.selection import keep_mask
from harness.model.step import Policy
from harness.probes.predictivity import auc, measure
from harness.results.identity import content_key
from harness.training.checkpoints import read_checkpoint, save_checkpoint
from methods.dejavu import DejaVu
from methods.griffin import Griffin
from methods.kv_skip import KvSkip
from methods.lte import Lte
from methods.oracle import Oracle
from methods.predictors import recall_at_density, train, unit_rms, weighted_bce, weighted_bce_gradient
from tests import tiny

ALL = Policy()


def tensors(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value_of(rows, metric: str, site: str, layer: int | None = None) -> float:
    (row,) = [r for r in rows if (r["metric"], r["site"], r["layer"]) == (metric, site, layer)]
    return row["value"]


# ------------------------------------------------------------------------------------------- training


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.005]))
def test_loss_weighs_negatives_by_the_density_of_labels(seed, floor):
    logits = tensors(seed, 7, 5).double().requires_grad_()
    labels = tensors(seed + 1, 7, 5) > 0.7
    density = labels.double().mean()
    weight = torch.where(labels, torch.ones((), dtype=torch.float64), density + floor)
    expected = F.binary_cross_entropy_with_logits(logits, labels.double(), weight=weight)
    torch.testing.assert_close(weighted_bce(logits, labels, floor), expected)
    expected.backward()
    torch.testing.assert_close(weighted_bce_gradient(logits.detach(), labels, floor), logits.grad)


def test_recall_allows_as_many_as_there_are_positives():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    labels = torch.tensor([[True, False, True, False], [False, False, False, True]])
    assert recall_at_density(scores, labels) == pytest.approx(2 / 3)
    assert recall_at_density(labels.float(), labels) == 1.0


def test_training_learns_a_linear_rule_whatever_the_size_of_the_tokens():
    x = tensors(0, 4000, 24)
    rule = tensors(1, 40, 24)
    labels = torch.zeros(4000, 40, dtype=torch.bool).scatter_(-1, (x @ rule.T).topk(10, -1).indices, True)
    uneven = x * (10 * tensors(2, 4000, 1)).exp().clamp(1e-2, 1e2)
    made = train(unit_rms(uneven), labels, rank=24, epochs=12, floor=0.005, seed=0)
    assert made.recall > 0.85  # by chance: 0.25
    assert made.held_out.shape == (200, 40)
    torch.testing.assert_close(unit_rms(uneven[-200:]) @ made.down.T @ made.up.T, made.held_out, rtol=1e-3, atol=1e-3)
    again = train(unit_rms(uneven), labels, rank=24, epochs=12, floor=0.005, seed=0)
    assert torch.equal(again.down, made.down) and torch.equal(again.up, made.up)


def test_labels_are_the_largest_contributions_of_a_gated_mlp_and_the_positives_of_a_relu():
    for family in ("llama", "opt"):
        view = tiny.view(family)
        calibration = tiny.calibration(view)
        _, labels = DejaVu(0.5, label_density=0.25)._examples(view, calibration)
        hidden = calibration.activations("mlp_hidden", "attn_out")
        for layer, block in enumerate(view.blocks):
            x = hidden["mlp_hidden"][layer]
            if family == "opt":
                assert torch.equal(labels["neurons"][layer], x > 0)
            else:
                size = x.abs() * block.down.weight.norm(dim=0)
                cut = size.sort(-1, descending=True).values[:, 31:32]  # a quarter of 128
                assert torch.equal(labels["neurons"][layer], size >= cut)
            norms = hidden["attn_out"][layer].view(len(x), view.n_heads, view.head_dim).norm(dim=-1)
            assert (labels["heads"][layer].sum(-1) == 1).all()
            # a maximum, not the maximum: heads of one group tie where they attend to a single token
            assert torch.equal(norms[labels["heads"][layer]], norms.max(-1).values)


def test_a_killed_fit_goes_on_by_layer(tmp_path, monkeypatch):
    view = tiny.view("llama")
    method = DejaVu(0.5, rank=4, epochs=1)
    whole = method.fit(view, tiny.calibration(view))
    calls = []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(methods.dejavu, "train", dying)
    calibration = tiny.calibration(view)
    calibration.scratch = Scratch(tmp_path / "fit.layers")
    with pytest.raises(KeyboardInterrupt):
        method.fit(view, calibration)
    first = sorted((tmp_path / "fit.layers").iterdir())
    first[0].write_bytes(b"torn")  # as a full disk would leave it
    again = method.fit(view, calibration)
    assert len(calls) == 5 + 3, "two layers of six were missing, and one was torn"
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    calibration.scratch.clear()
    assert not (tmp_path / "fit.layers").exists()


# -------------------------------------------------------------------------------------------- DejaVu


def test_what_each_predictor_sees():
    assert DejaVu(0.5).sites == {"neurons": INPUT, "heads": INPUT}
    assert DejaVu(0.5, predictor="lookahead").sites == {"neurons": residual(0), "heads": residual(1)}
    assert DejaVu(0.5, predictor="lookahead", lookahead=2, targets="mlp").sites == {"neurons": residual(1)}
    assert DejaVu(0.5, predictor="oracle", targets="heads").sites == {"heads": OUTPUT}
    assert DejaVu(0.0).sites == {}


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "ffn"},
        {"predictor": "none"},
        {"select_by": "k"},
        {"rank": 0},
        {"epochs": 1.5},
        {"lookahead": 0},
        {"label_density": 1.0},
        {"predictor": "oracle", "select_by": "score"},
    ],
)
def test_bad_options_are_one_sentence(options):
    with pytest.raises(ConfigError, match=r"^method\.dejavu\.[a-z_]+.*"):
        DejaVu(0.5, **options)


def test_looking_beyond_the_first_layer_is_unsupported():
    view = tiny.view("llama")
    assert DejaVu(0.5, predictor="lookahead", lookahead=2).unsupported(view) is None
    assert "3 blocks ahead" in DejaVu(0.5, predictor="lookahead", lookahead=3).unsupported(view)


def test_one_fit_serves_sparsities_and_rules_but_not_predictors():
    key = DejaVu(0.5).fit_key()
    assert key == DejaVu(0.8, select_by="score", lookahead=3).fit_key()
    assert key != DejaVu(0.5, predictor="lookahead").fit_key()
    assert DejaVu(0.5, predictor="oracle", rank=7).fit_key() == DejaVu(0.5, predictor="oracle").fit_key()


def test_two_linear_maps_are_stored_as_one_where_that_is_smaller():
    view = tiny.view("llama")
    method = DejaVu(0.5, rank=8, epochs=1)
    state = method.fit(view, tiny.calibration(view))
    assert {k for k in state if k.startswith("heads.")} == {"heads.whole", "heads.scores", "heads.recall"}
    assert state["neurons.down"].shape == (3, 8, 64) and state["neurons.up"].shape == (3, 128, 8)
    assert method.overhead_weights(view, state) == {"mlp": 3 * 8 * (64 + 128), "attn": 3 * 4 * 64}
    assert DejaVu(0.5, targets="mlp", predictor="random").overhead_weights(view, {}) == {}


def test_top_k_is_exact_and_a_score_varies_by_token():
    view = tiny.view("llama")
    state = DejaVu(0.5, targets="mlp", rank=8, epochs=2).fit(view, tiny.calibration(view))
    x = tiny.calibration(view).activations("mlp_in")["mlp_in"][1][None]
    counts = {}
    for rule in ("topk", "score"):
        method = DejaVu(0.7, targets="mlp", rank=8, epochs=2, select_by=rule)
        selection = method.select(method.plan(view, state), "neurons", 1, x, None)
        counts[rule] = keep_mask(selection, x).sum(-1).flatten()
    assert (counts["topk"] == round(0.3 * 128)).all()
    assert len(counts["score"].unique()) > 5
    assert counts["score"].float().mean().item() / 128 == pytest.approx(0.3, abs=0.08)


def test_oracle_keeps_the_largest_contributions():
    view = tiny.view("llama")
    method = DejaVu(0.75, predictor="oracle")
    plan, hidden = method.plan(view, {}), tensors(0, 1, 3, 128)
    keep = keep_mask(method.select(plan, "neurons", 1, hidden, None), hidden)
    size = hidden.abs() * view.blocks[1].down.weight.norm(dim=0)
    assert (size[keep].view(3, 32).min(-1).values >= size[~keep].view(3, 96).max(-1).values).all()
    heads = keep_mask(method.select(plan, "heads", 1, tensors(1, 1, 3, 64), None), hidden)
    assert (heads.sum(-1) == 1).all() and heads.shape[-1] == view.n_heads


# ---------------------------------------------------------------------------------------- the probe


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_auc_is_the_chance_of_ranking_right(seed):
    score = tensors(seed, 1, 12).mul(2).round()  # with ties
    positive = tensors(seed + 1, 1, 12) > 0.3
    yes, no = score[positive], score[~positive]
    found = auc(score, positive).item()
    if len(yes) == 0 or len(no) == 0:
        assert found != found
        return
    pairs = (yes[:, None] > no).float() + 0.5 * (yes[:, None] == no).float()
    assert found == pytest.approx(pairs.mean().item(), abs=1e-6)


@pytest.fixture(scope="module")
def structured():
    """A tiny Llama whose neurons and heads can be predicted: text with structure, and a fit of every kind."""
    view = tiny.view("llama")
    calibration = Calibration(view, [tiny.tokens(16, 128, seed=s) for s in range(3)])
    fits = {}
    for predictor in ("serial", "lookahead", "oracle", "random"):
        method = DejaVu(0.5, predictor=predictor, rank=32, epochs=10)
        fits[predictor] = (method, method.fit(view, calibration))
    return view, fits


def test_oracle_beats_prediction_beats_chance(structured):
    view, fits = structured
    windows = tiny.tokens(4, 64, seed=9)
    rows = {name: measure(view, [fitted], ALL, windows) for name, fitted in fits.items()}
    for site in ("neurons", "heads"):
        for metric in ("recall", "captured"):
            oracle, serial, random = (value_of(rows[n], metric, site) for n in ("oracle", "serial", "random"))
            assert oracle > serial + 0.01 > random + 0.02, (site, metric)
        assert value_of(rows["oracle"], "recall", site) == 1.0 == value_of(rows["oracle"], "precision", site)
        assert value_of(rows["oracle"], "auc", site) == 1.0
        assert value_of(rows["random"], "recall", site) == pytest.approx(0.5, abs=0.05)
        assert value_of(rows["serial"], "auc", site) > 0.55
        assert all(value_of(rows[n], "density", site) == pytest.approx(0.5) for n in rows)
        mean = sum(value_of(rows["serial"], "recall", site, layer) for layer in range(3)) / 3
        assert value_of(rows["serial"], "recall", site) == pytest.approx(mean)
    assert all(row["unit"] == "share" and row["n"] == 4 * 64 for row in rows["serial"])
    assert value_of(rows["random"], "auc", "neurons") == pytest.approx(0.5, abs=0.02)
    # deeper layers, where another layer's input is a worse guess than the own one
    assert value_of(rows["serial"], "recall", "heads", 2) > value_of(rows["lookahead"], "recall", "heads", 2)


def test_the_probe_watches_and_drops_nothing(structured):
    view, fits = structured
    ids = tiny.tokens(2, 32)
    with torch.no_grad():
        before = view.model(ids).logits
    alone = measure(view, [fits["serial"]], ALL, ids)
    # the method watched sees dense activations: its own sparsity has no say in what matters
    low = (DejaVu(0.25, rank=32, epochs=10), fits["serial"][1])
    assert value_of(measure(view, [low], ALL, ids), "auc", "heads") != value_of(alone, "auc", "heads")
    with torch.no_grad():
        assert torch.equal(view.model(ids).logits, before)


def test_a_relus_zeros_do_not_matter():
    view = tiny.view("opt")
    method = DejaVu(0.1, targets="mlp", predictor="oracle")
    rows = measure(view, [(method, {})], ALL, tiny.tokens(2, 32))
    assert value_of(rows, "recall", "neurons") == 1.0
    assert value_of(rows, "captured", "neurons") == pytest.approx(1.0)
    assert value_of(rows, "precision", "neurons") < 0.75, "half of OPT's neurons are zero, and 90 % were kept"


def test_methods_without_neurons_heads_or_select_give_no_rows():
    view = tiny.view("llama")
    for method in (Oracle(0.5), KvSkip(0.5)):
        assert measure(view, [(method, {})], ALL, tiny.tokens(2, 16)) == []


def test_prompt_fixed_methods_are_judged_on_decode_tokens():
    view = tiny.view("llama")
    rows = measure(view, [(Griffin(0.5), {})], Policy("decode"), tiny.tokens(2, 32))
    assert all(row["n"] == 2 * 16 and row["step_phase"] == "decode" for row in rows)
    assert 0.5 < value_of(rows, "recall", "neurons") < 1
    assert value_of(rows, "density", "neurons") == pytest.approx(0.5)


# --------------------------------------------------------------------------------------------- LTE


def router_folder(tmp_path: Path, view, **changes) -> Path:
    """A checkpoint with random routers over 16 experts of 8 neurons."""
    torch.manual_seed(3)
    experts = torch.stack([torch.randperm(view.d_ff) % 16 for _ in range(view.n_layers)])
    held = {
        "threshold": torch.zeros(view.n_layers),
        "router": torch.randn(view.n_layers, 16, view.d_model),
        "expert_of": experts,
    }
    record = {"name": "lte", "activation": "silu", "factor": 1.0, "base": "tiny-base"} | changes
    save_checkpoint(tmp_path, {k: v for k, v in held.items() if k not in record.get("without", ())}, record)
    return tmp_path


@dataclass(frozen=True)
class Loaded:
    view: object
    method: Lte
    state: dict


@pytest.fixture
def lte(tmp_path) -> Loaded:
    view = tiny.view("llama")
    method = Lte(0.5, checkpoint=str(router_folder(tmp_path, view)))
    record = read_checkpoint(tmp_path).record  # the fingerprint that harness.run.session gives a student
    view.fingerprint = content_key({"base": "tiny-base", "adapter": record["sha256"]})
    return Loaded(view, method, method.fit(view, tiny.calibration(view)))


def test_lte_keeps_whole_experts_and_as_many_as_score_above_a_half(lte):
    view, method = lte.view, lte.method
    assert method.unsupported(view) is None
    plan, x = method.plan(view, lte.state), tensors(0, 2, 9, 64)
    keep = keep_mask(method.select(plan, "neurons", 1, x, None), x)
    experts = torch.sigmoid(x @ lte.state["router"][1].T) > 0.5
    assert torch.equal(keep, experts[..., lte.state["expert_of"][1]])
    counts = experts.sum(-1).flatten()
    assert len(counts.unique()) > 2, "the number of experts must vary by token"
    assert torch.equal(keep.sum(-1).flatten(), counts * 8)


def test_lte_obeys_the_contract(lte):
    view, ids = lte.view, tiny.tokens(2, 24)
    with torch.no_grad():
        dense = view.model(ids).logits
        with attached(view, [(lte.method, lte.state)], ALL, count=True) as ledger:
            together = view.model(ids).logits
        with attached(view, [(lte.method, lte.state)], ALL):
            alone = torch.cat([view.model(row[None]).logits for row in ids])
        with attached(view, [(Lte(0.0, lte.method.checkpoint), lte.state)], ALL):
            assert torch.equal(view.model(ids).logits, dense)
        assert torch.equal(view.model(ids).logits, dense)
    assert not torch.allclose(together, dense, atol=1e-2)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert isinstance(ledger, Ledger)
    skipped, total = ledger.skipped_weights(("gate", "up", "down"))
    assert 0.2 < (skipped.sum() / total.sum()).item() < 0.8
    assert lte.method.overhead_weights(view, lte.state) == {"mlp": 3 * 16 * 64}
    rows = measure(view, [(lte.method, lte.state)], ALL, ids)
    assert 0 < value_of(rows, "density", "neurons") < 1 and value_of(rows, "auc", "neurons") > 0


def test_lte_without_routers_says_how_to_get_them(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.py train=lte"):
        Lte(0.5)
    view = tiny.view("llama")
    folder = router_folder(tmp_path, view, without=("router",))
    with pytest.raises(ConfigError, match="holds no routers"):
        Lte(0.5, checkpoint=str(folder)).fit(view, tiny.calibration(view))
    with pytest.raises(ConfigError, match="no checkpoint"):
        Lte(0.5, checkpoint="nowhere").unsupported(view)


@pytest.mark.parametrize("fingerprint", ["", "tiny-base"])
def test_routers_of_another_model_are_refused(lte, fingerprint):
    lte.view.fingerprint = fingerprint
    assert "trained for another model" in lte.method.unsupported(lte.view)


def test_contributions_are_norms_of_what_is_added():
    view = tiny.view("mistral")
    hidden, heads = tensors(0, 1, 2, 128), tensors(1, 1, 2, 64)
    true = Contributions(view)
    weight = view.blocks[2].down.weight
    added = torch.stack([(hidden[..., i : i + 1] * weight[:, i]).norm(dim=-1) for i in range(128)], dim=-1)
    torch.testing.assert_close(true.of("neurons", 2, hidden), added)
    torch.testing.assert_close(true.of("heads", 2, heads)[0, 1, 3], heads[0, 1, 24:32].norm())
