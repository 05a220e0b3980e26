"""Gemma 3n: shared K and V, several residual streams, weights beside the projections, a top-k of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.errors import UnsupportedError
from harness.execution.attach import attached
from harness.execution.ledger import ATTENTION
from harness.fitting.quantiles import Quantiles
from harness.model.formats import Format
from harness.model.quantise import quantise
from harness.model.selection import PROJECTIONS
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.latency.reads import step_bytes
from harness.probes.sparsity import measure
from harness.run.scope import coverage, to_native
from methods.dense import Dense
from methods.kv_skip import KvSkip
from methods.statistical_topk import StatisticalTopK
from methods.teal import Teal, block_calls, block_output, greedy_levels, levels_of, shares
from tests import tiny
from tests.test_families import loaded

SHARING = (2, 3)  # blocks that take K and V from those before
SITE_OF = {p: site for site, projections in PROJECTIONS.items() for p in projections}


def inputs(view: View, run: Any) -> dict[tuple[str, int], Tensor]:
    """What reaches every projection after all that is attached."""
    seen: dict[tuple[str, int], Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _m, args, key=(name, layer): seen.__setitem__(key, args[0]))
        for layer, block in enumerate(view.blocks)
        for name, module in block.projections()
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def rows_of(view: View, methods: list) -> dict[tuple[str, str, int | None], float]:
    """Sparsity rows over all tokens: value by (metric, site, layer)."""
    rows = measure(view, methods, Policy(), tiny.tokens(4, 32, seed=3))
    return {(r["metric"], r["site"], r.get("layer")): r["value"] for r in rows if r["step_phase"] == "all"}


@torch.no_grad()
def test_teal_drops_what_lies_below_its_quantiles_and_is_counted_of_all_that_a_token_reads() -> None:
    view, ids = tiny.view("gemma3n"), tiny.tokens(2, 32)
    calibration = tiny.calibration(view)
    method = Teal(0.5)
    state = method.fit(view, calibration)
    grids = {}
    for site in PROJECTIONS:
        kept = Quantiles(view.n_layers)
        calibration.visit({site: kept.see})
        grids[site] = kept.grid()
    touched, total = 0, 0
    with attached(view, [(method, state)], Policy(), count=True) as ledger:
        seen = inputs(view, lambda: view.model(ids, use_cache=False))
    for (name, layer), x in seen.items():
        module = getattr(view.blocks[layer], name)
        t = Quantiles.at(grids[SITE_OF[name]][layer], 0.5)
        dense = x.abs() > t
        assert torch.equal(x != 0, dense), "what is left is above the threshold, all else is zero"
        assert 0.3 < 1 - dense.double().mean() < 0.9
        touched += int(dense.sum()) * module.out_features
        total += module.weight.numel() * ids.numel()
    assert {key for key in seen if key[0] in "kv"} == {(p, layer) for p in "kv" for layer in (0, 1)}
    beside = sum(
        part.weight.numel()
        for layer in view.model.model.layers
        for part in (
            layer.altup.correction_coefs,
            layer.altup.prediction_coefs,
            layer.altup.modality_router,
            layer.laurel.linear_left,
            layer.laurel.linear_right,
            layer.per_layer_input_gate,
            layer.per_layer_projection,
        )
    )
    assert ledger is not None
    skipped, counted = (part.sum().item() for part in ledger.skipped_weights(tuple(view.projection_names())))
    assert counted == total + beside * ids.numel() == view.block_weights * view.n_layers * ids.numel()
    assert skipped == total - touched
    _, attention = ledger.skipped_weights(ATTENTION)
    assert attention.sum() == sum(view.weights(p) for p in ATTENTION) * view.n_layers * ids.numel()


@torch.no_grad()
def test_residual_is_the_stream_that_attention_reads() -> None:
    view, seen = tiny.view("gemma3n"), {}
    model = view.model.model
    for layer, block in enumerate(view.blocks):
        block.layer.register_forward_pre_hook(lambda _m, args, i=layer: seen.__setitem__(i, args[0]))
    ids = tiny.tokens(2, 9)
    found: dict[int, Tensor] = {}
    calibration = tiny.calibration(view)
    calibration._batches = [ids]
    calibration.visit({"residual": lambda layer, x: found.__setitem__(layer, x)})
    for layer in range(view.n_layers):
        streams = seen[layer]
        assert streams.shape == (4, 2, 9, view.d_model) and found[layer].shape == (2, 9, view.d_model)
        assert torch.equal(found[layer], model.layers[layer].altup.predict(streams)[0])


@torch.no_grad()
def test_its_own_top_k_is_the_dense_model_and_statistical_topk_is_for_the_other_blocks() -> None:
    view = tiny.view("gemma3n")
    assert [block.own_topk for block in view.blocks] == [0.8, 0.0, 0.0, 0.0]
    dense = rows_of(view, [(Dense(), {})])
    assert dense["zeros", "gate", 0] == pytest.approx(0.8, abs=0.03) and dense["zeros", "gate", 1] == 0
    gates: dict[int, Tensor] = {}
    for layer, block in enumerate(view.blocks):
        block.gate.register_forward_hook(lambda _m, _a, out, i=layer: gates.__setitem__(i, out))
    method = StatisticalTopK(0.6)
    assert method.refusal(view) is None
    with attached(view, [(method, {})], Policy()):
        seen = inputs(view, lambda: view.model(tiny.tokens(2, 32), use_cache=False))
    for layer in range(4):
        quantile = NormalDist().inv_cdf(0.6 if layer else 0.8)
        a = gates[layer]
        above = a > a.mean(-1, keepdim=True) + a.std(-1, correction=0, keepdim=True) * quantile
        assert torch.equal(seen["down", layer] != 0, above)
    told = measure(view, [(method, {})], Policy(), tiny.tokens(4, 32, seed=3))
    said = {r["layer"] for r in told if r["site"] == "neurons" and "own top-k" in (r.get("message") or "")}
    assert said == {0}, "a row that is far from what was asked for says why"
    rows = rows_of(view, [(method, {})])
    assert rows["achieved", "neurons", 0] == pytest.approx(0.8, abs=0.03)
    assert rows["achieved", "neurons", 2] == pytest.approx(0.6, abs=0.03)


def test_greedy_allocation_gives_nothing_to_what_a_block_lacks_and_shows_dense_k_and_v() -> None:
    view = tiny.view("gemma3n")
    calibration, method = tiny.calibration(view), Teal(0.5, allocation="greedy", base_step=0.2, greedy_tokens=128)
    state = method.fit(view, calibration)
    k, v = (view.projection_names().index(p) for p in "kv")
    assert (state["levels"][2:, :, [k, v]] == 0).all() and (state["levels"][:2, -1, [k, v]] > 0).any()
    for layer, level in enumerate(levels_of(view, state["levels"], 0.5)):
        share = shares(view, layer)
        assert sum(level[p] * s for p, s in zip(view.projection_names(), share.tolist(), strict=True)) == pytest.approx(
            0.5
        )
    with torch.no_grad():
        calls = block_calls(view, calibration, 128)
        before = [block_output(block, *calls[i][0]) for i, block in enumerate(view.blocks)]
        view.blocks[1].k.weight.mul_(2)  # a trial of an earlier block leaves its K and V to nobody
        block_output(view.blocks[1], *calls[1][0])
        view.blocks[1].k.weight.div_(2)
        for layer in SHARING:
            assert torch.equal(block_output(view.blocks[layer], *calls[layer][0]), before[layer])
    assert torch.equal(greedy_levels(view, calibration, state, 0.2, 128), state["levels"])


@pytest.mark.parametrize("kv, runs", [("skip", False), ("recompute", False), ("mask_output", True)])
def test_entries_that_later_blocks_read_too_are_not_left_out(kv: Any, runs: bool) -> None:
    refusal = KvSkip(0.5, select_by="random", unit="group", kv=kv).refusal(tiny.view("gemma3n"))
    assert (refusal is None) == runs
    assert runs or "read the K and V of earlier ones: an entry" in str(refusal)


def test_the_whole_model_as_a_scope_reckons_with_weights_that_nothing_skips() -> None:
    view, method = tiny.view("gemma3n"), Teal(0.5)
    state = method.fit(view, tiny.calibration(view))
    assert coverage(view, [method]) == pytest.approx(1 - view.beside / view.block_weights)
    [(native, _)] = to_native(view, [(method, state)], 0.5)
    assert native.sparsity * (1 - view.beside / view.block_weights) == pytest.approx(0.5)
    projections = sum(m.weight.numel() for block in view.blocks for _, m in block.projections())
    head = view.model.get_output_embeddings().weight.numel()
    read = (projections + 4 * view.beside + head + view.around) * 4
    assert step_bytes(view, 1.0, 1, 0) == read


def test_weights_beside_quantised_projections_have_sixteen_bits() -> None:
    view = tiny.view("gemma3n")
    before = view.model.model.layers[0].laurel.linear_left.weight.clone()
    quantise(view, Format(4, 32))
    assert torch.equal(view.model.model.layers[0].laurel.linear_left.weight, before)
    method = Teal(0.5)
    rows = rows_of(view, [(method, method.fit(view, tiny.calibration(view)))])
    projections = sum(m.weight.numel() for block in view.blocks for _, m in block.projections())
    stored = projections * (4 / 8 + 2 / 32) + 4 * view.beside * 2
    assert rows["total_bytes", "model", None] == 4 * 32 * stored
    parts = rows["skipped_bytes", "attn", None] + rows["skipped_bytes", "mlp", None]
    assert rows["skipped_bytes", "model", None] == pytest.approx(parts)


def test_blocks_of_several_widths_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="differ in width"):
        tiny.view("gemma3n", intermediate_size=[128, 128, 64, 128])


@torch.no_grad()
def test_a_checkpoint_with_towers_loads_as_its_language_model(tmp_path: Path, tokenizer: Any) -> None:
    """As published: the text model's weights under another name, K of sharing blocks among them, towers beside."""
    tiny.save_with_tokenizer(tmp_path, tokenizer, family="gemma3n", vocab_size_per_layer_input=len(tokenizer))
    ids = tiny.tokens(2, 12)
    wanted = loaded(tmp_path).view.model(ids).logits
    weights = load_file(tmp_path / "model.safetensors")
    weights = {re.sub(r"^model\.", "model.language_model.", name): value for name, value in weights.items()}
    for layer in SHARING:
        weights[f"model.language_model.layers.{layer}.self_attn.k_proj.weight"] = torch.ones(32, 64)
    weights["model.vision_tower.stem.weight"] = torch.ones(3, 3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((tmp_path / "config.json").read_text())
    outer = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": text,
        "audio_config": {"model_type": "gemma3n_audio"},
        "vision_config": {"model_type": "gemma3n_vision"},
    }
    (tmp_path / "config.json").write_text(json.dumps(outer))
    found = loaded(tmp_path)
    assert found.view.family == "gemma3n" and type(found.view.model).__name__ == "Gemma3nForCausalLM"
    assert found.max_length == 512
    assert torch.equal(found.view.model(ids).logits, wanted)
