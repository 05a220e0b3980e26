"""Family adapters: every model in conf/model, tiny random models of every family, and what is refused."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from harness.claims.pairs import COUNTERPARTS
from harness.errors import ConfigError, UnsupportedError
from harness.model.families import adapters, view_of
from harness.model.families.fused import SplitLinear
from tests import tiny

MODELS = {path.stem: yaml.safe_load(path.read_text()) for path in Path("conf/model").glob("*.yaml")}
STUDY = ("llama-2-7b", "llama-2-13b", "llama-3-8b", "mistral-7b", "opt-6.7b", "relullama-7b", "prosparse-7b")
RELU = (
    *(f"opt-{size}" for size in ("1.3b", "2.7b", "6.7b", "13b")),
    *(f"{name}-{size}" for name in ("relullama", "prosparse") for size in ("7b", "13b")),
    *("turbosparse-mistral-7b", "minicpm-s-1b"),
    *(f"sparsing-law-{size}-{act}" for size in ("0.1b", "0.2b", "0.4b", "0.8b", "1.2b") for act in ("relu", "silu")),
)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_entry_has_the_keys(name: str) -> None:
    model = MODELS[name]
    optional = {"adapter", "embedded", "accept_license", "shape"}
    assert set(model) - optional == {"name", "source", "path", "repo", "revision"}
    assert model["name"] == (None if name == "local" else name)
    if model["source"] == "hub":
        assert model["path"] is None and re.fullmatch(r"[\w.-]+/[\w.-]+", model["repo"])
        pinned = re.fullmatch("[0-9a-f]{40}", model["revision"])
        text = Path(f"conf/model/{name}.yaml").read_text()
        assert pinned or "# Not pinned" in text, "a branch moves; numbers need a commit, or a word that they lack it"
    else:
        assert model["repo"] is None and model["revision"] is None


def test_the_models_of_the_study_are_there() -> None:
    assert set(COUNTERPARTS) <= set(RELU) | set(STUDY) and set(COUNTERPARTS.values()) <= set(MODELS)
    assert all(MODELS[name]["source"] == "hub" for name in (*STUDY, *RELU))


PLAIN = ("opt", "gpt_neox", "falcon")
ACTIVATION = {"opt": "relu", "gpt_neox": "gelu", "falcon": "gelu"}
ACTIVATION |= dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3n"), "gelu_pytorch_tanh")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_view_has_the_shapes_of_its_model(family: str) -> None:
    view = tiny.view(family)
    config = view.model.config
    assert view.family == ("llama" if family == "mistral" else family)
    assert (view.n_layers, view.d_model) == (config.num_hidden_layers, config.hidden_size)
    assert view.gated == (family not in PLAIN)
    assert view.n_heads * view.head_dim == view.channels("o")
    assert view.group_size * view.n_kv_heads == view.n_heads
    names = ["q", "k", "v", "o", "gate", "up", "down"] if view.gated else ["q", "k", "v", "o", "up", "down"]
    assert view.projection_names() == names
    for block in view.blocks:
        shapes = {name: (module.out_features, module.in_features) for name, module in block.projections()}
        assert set(shapes) == set(names) - ({"k", "v"} if family == "gemma3n" and block in view.blocks[2:] else set())
        wide, narrow = view.n_heads * view.head_dim, view.n_kv_heads * view.head_dim
        assert shapes["q"] == (wide, view.d_model)
        assert (
            shapes.get("k", (narrow, view.d_model)) == shapes.get("v", (narrow, view.d_model)) == (narrow, view.d_model)
        )
        assert shapes["o"] == (view.d_model, wide)
        assert shapes["up"] == shapes.get("gate", shapes["up"]) == (view.d_ff, view.d_model)
        assert shapes["down"] == (view.d_model, view.d_ff)
    assert view.activation == ACTIVATION.get(family, "silu")
    if family in tiny.MIXTURES:
        return  # their own test says what is counted
    inside = sum(m.weight.numel() for m in view.model.modules() if isinstance(m, nn.Linear)) - vocabulary_weights(view)
    assert view.block_weights * view.n_layers == inside - view.around, "every linear weight of the blocks counts once"
    assert (view.beside > 0) == (view.around > 0) == (family == "gemma3n")


@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_a_mixture_counts_the_experts_that_a_token_is_routed_to_and_no_others(family: str) -> None:
    view = tiny.view(family)
    experts = view.model.model.layers[0].mlp.experts
    routed = view.model.config.num_experts_per_tok
    all_of_them = sum(experts.get_submodule(p).weight.numel() for p in ("gate_proj", "up_proj", "down_proj"))
    n_experts = len(experts.gate_proj.weight)
    assert 1 < routed < n_experts
    assert sum(view.weights(p) for p in ("gate", "up", "down")) * n_experts == all_of_them * routed
    assert view.d_ff == routed * 64


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_view_changes_no_logits_and_copies_no_weights(family: str) -> None:
    """Fused layers are taken apart and fused experts replaced: the same logits, the same bytes, as often as asked."""
    model, ids = tiny.make(family), tiny.tokens(2, 33)
    wanted, bytes_before = model(ids).logits, storage(model)
    view = view_of(model)
    assert torch.equal(model(ids).logits, wanted)
    assert storage(model) == bytes_before
    copied = copy.deepcopy(model)
    again = view_of(copied)
    assert torch.equal(copied(ids).logits, wanted)
    again.blocks[1].q.weight.zero_()
    assert not torch.equal(copied(ids).logits, wanted), "the projections of the view are those that the model runs"
    assert torch.equal(view.model(ids).logits, wanted), "a copy shares nothing"


def storage(model: nn.Module) -> int:
    """Bytes that a model's parameters keep alive."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(found.values())


def test_the_parts_of_a_fused_layer_are_views_of_its_weight() -> None:
    model = tiny.make("phi3")
    fused = model.model.layers[1].mlp.gate_up_proj.weight
    block = view_of(model).blocks[1]
    assert block.gate.weight.data_ptr() == fused.data_ptr()
    assert block.up.weight.data_ptr() == fused[128:].data_ptr()


def test_a_hook_on_a_part_of_a_fused_layer_changes_that_part_alone() -> None:
    for family in ("phi3", "gpt_neox", "falcon"):
        view, seen = tiny.view(family), {}
        block, ids = view.blocks[0], tiny.tokens(1, 5)
        fused = next(m for m in view.model.modules() if isinstance(m, SplitLinear) and block.k in m.parts())
        fused.register_forward_hook(lambda _m, _a, out, seen=seen: seen.update(fused=out))
        for name in "qkv":
            getattr(block, name).register_forward_hook(lambda _m, _a, out, n=name, seen=seen: seen.update({n: out}))
        view.model(ids)
        before = dict(seen)
        block.k.register_forward_pre_hook(lambda _m, args: (args[0] * 0,))
        view.model(ids)
        changed = (seen["fused"] != before["fused"]).any(0).any(0).sum()
        assert 0 < changed <= block.k.out_features
        assert all(torch.equal(seen[name], before[name]) for name in "qv")


def vocabulary_weights(view: Any) -> int:
    """Weights of the head, which is no part of a block."""
    return view.model.get_output_embeddings().weight.numel()


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "olmo2"])
@torch.no_grad()
def test_the_parts_of_a_view_are_the_parts_that_the_model_runs(family: str) -> None:
    """Final hidden states through the head are the logits; norms come before the projections that they feed."""
    view, seen = tiny.view(family), {}
    block, (attn_norm, mlp_norm) = view.blocks[1], view.norms[1]
    hooks = [
        view.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.update(final=args[0])),
        attn_norm.register_forward_hook(lambda _m, _a, out: seen.update(attn_norm=out)),
        mlp_norm.register_forward_hook(lambda _m, _a, out: seen.update(mlp_norm=out)),
        block.q.register_forward_pre_hook(lambda _, args: seen.update(q=args[0])),
        block.up.register_forward_pre_hook(lambda _, args: seen.update(up=args[0])),
        block.act.register_forward_hook(lambda _m, _a, out: seen.update(act=out)),
        view.final_norm.register_forward_hook(lambda _m, _a, out: seen.update(final_norm=out)),
    ]
    logits = view.model(tiny.tokens(2, 7)).logits
    for hook in hooks:
        hook.remove()
    assert torch.equal(view.logits(seen["final"]), logits), "capped where the model caps them"
    assert torch.equal(seen["final"], seen["final_norm"])
    assert torch.equal(seen["q"], seen["attn_norm"])
    assert torch.equal(seen["up"].flatten(), seen["mlp_norm"].flatten())
    assert seen["act"].shape[-1] == view.d_ff


def test_an_unknown_model_type_is_refused_with_the_known_ones() -> None:
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type="mamba")
    with pytest.raises(UnsupportedError, match=r"'mamba' \(known: .*llama.*opt.*qwen3.*CONTRIBUTING.md"):
        view_of(model)
    assert "## Add a family" in Path("CONTRIBUTING.md").read_text()


def test_a_mixture_with_blocks_that_have_no_experts_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="blocks without experts"):
        tiny.view("qwen3_moe", mlp_only_layers=[1])


def test_no_two_adapters_claim_one_model_type() -> None:
    types = [model_type for adapter in set(adapters().values()) for model_type in adapter.MODEL_TYPES]
    assert len(types) == len(set(types))


# ------------------------------------------------------------------------------------------ ReLU models


def loaded(folder: Path) -> Any:
    """What the harness loads from a local folder."""
    from harness.run import loading

    model = {"name": "local", "source": "path", "path": str(folder), "repo": None, "revision": None}
    return loading._load(json.dumps(model, sort_keys=True), "float32", "cpu")


def test_a_relu_llama_is_an_ordinary_llama(tmp_path: Path, tokenizer: Any) -> None:
    found = loaded(tiny.save_with_tokenizer(tmp_path, tokenizer, hidden_act="relu"))
    assert (found.view.family, found.view.activation) == ("llama", "relu")
    assert isinstance(found.view.blocks[0].act, nn.ReLU)


def as_prosparse(folder: Path, threshold: float) -> None:
    """Write a LLaMA folder's config as the published ProSparse checkpoints have it."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "architectures": ["SparseLlamaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sparsellama.SparseLlamaConfig",
            "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
        },
        "hidden_act": "fatrelu",
        "hidden_act_param": threshold,
        "model_type": "sparsellama",
    }
    path.write_text(json.dumps(config))
    for name in ("configuration_sparsellama", "modeling_sparsellama"):
        (folder / f"{name}.py").write_text("raise SystemExit('remote code was run')")


@torch.no_grad()
def test_prosparse_loads_without_its_remote_code_and_keeps_its_threshold(tmp_path: Path, tokenizer: Any) -> None:
    tokens = tiny.tokens(1, 9)
    relu = loaded(tiny.save_with_tokenizer(tmp_path / "relu", tokenizer, hidden_act="relu")).view.model(tokens).logits
    for threshold, name in ((0.0, "zero"), (0.3, "high")):
        folder = tiny.save_with_tokenizer(tmp_path / name, tokenizer, hidden_act="relu")
        as_prosparse(folder, threshold)
        view = loaded(folder).view
        assert (view.family, view.activation) == ("llama", "fatrelu")
        gates: list[torch.Tensor] = []
        hook = view.blocks[0].act.register_forward_hook(lambda _m, _a, out, gates=gates: gates.append(out))
        logits = view.model(tokens).logits
        hook.remove()
        kept = gates[0][gates[0] != 0]
        assert len(kept) > 0 and kept.min() > threshold
        assert torch.equal(logits, relu) == (threshold == 0)


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Change a folder's config as published checkpoints have it; None drops a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


CONSTANTS = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}


@pytest.mark.parametrize("activation, tied", [("silu", True), ("relu", False), ("fatrelu", True)])
@torch.no_grad()
def test_minicpm_is_a_llama_with_its_constants_in_the_weights(
    tmp_path: Path, tokenizer: Any, activation: str, tied: bool
) -> None:
    act = "relu" if activation == "fatrelu" else activation
    folder = tiny.save_with_tokenizer(tmp_path / "minicpm", tokenizer, tie_word_embeddings=tied, hidden_act=act)
    plain = tiny.view(
        "llama", vocabulary=len(tokenizer), tie_word_embeddings=tied, hidden_act=act
    )  # then the constants by hooks, each where the paper has it
    branch = CONSTANTS["scale_depth"] / len(plain.blocks) ** 0.5
    plain.model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out * CONSTANTS["scale_emb"])
    plain.final_norm.register_forward_hook(lambda _m, _a, out: out * CONSTANTS["dim_model_base"] / plain.d_model)
    for block in plain.blocks:
        block.o.register_forward_hook(lambda _m, _a, out: out * branch)
        block.down.register_forward_hook(lambda _m, _a, out: out * branch)
        if activation == "fatrelu":
            block.act.register_forward_hook(lambda _m, args, out: torch.where(args[0] > 0.3, out, 0))
    tokens = tiny.tokens(2, 9)
    wanted = plain.model(tokens).logits
    rewrite_config(
        folder,
        **CONSTANTS,
        architectures=["MiniCPMForCausalLM"],
        auto_map={"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
        hidden_act=activation,
        hidden_act_param=0.3 if activation == "fatrelu" else None,
        model_type="minicpm" if tied else None,  # MiniCPM-S leaves it out
        tie_word_embeddings=None if tied else False,  # tied is the default of the published code
    )
    view = loaded(folder).view
    assert (view.family, view.activation, view.d_ff) == ("llama", activation, plain.d_ff)
    torch.testing.assert_close(view.model(tokens).logits, wanted, atol=1e-4, rtol=1e-4)
    view.model.save_pretrained(tmp_path / "saved")  # with the constants in the weights: not to be applied twice
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(again(tokens).logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_minicpm_with_experts_or_latent_attention_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    folder = tiny.save_with_tokenizer(tmp_path, tokenizer)
    rewrite_config(folder, model_type="minicpm", ffn_type="moe")
    with pytest.raises(ConfigError, match="'moe' is no LLaMA"):
        loaded(folder)


@torch.no_grad()
def test_turbosparse_is_a_mistral_with_relu_on_both_halves(tmp_path: Path, tokenizer: Any) -> None:
    folder = tiny.save_with_tokenizer(tmp_path, tokenizer, family="mistral", hidden_act="relu")
    plain = tiny.view("mistral", vocabulary=len(tokenizer), hidden_act="relu")
    for block in plain.blocks:
        block.up.register_forward_hook(lambda _m, _a, out: out.clamp_min(0))
    tokens = tiny.tokens(2, 9)
    wanted = plain.model(tokens).logits
    shard = folder / "model.safetensors"
    save_file(
        load_file(shard) | {"model.layers.0.mlp.predictor.fc1.weight": torch.zeros(2, 64)}, shard, {"format": "pt"}
    )
    rewrite_config(
        folder,
        model_type="bamboo",
        architectures=["BambooForCausalLM"],
        auto_map={"AutoConfig": "configuration_bamboo.BambooConfig"},
    )
    view = loaded(folder).view
    assert (view.family, view.activation) == ("llama", "drelu")
    hidden: list[torch.Tensor] = []
    view.blocks[1].down.register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))
    assert torch.equal(view.model(tokens).logits, wanted)
    assert hidden[0].min() == 0 and 0.5 < (hidden[0] == 0).float().mean() < 1, "zeros of the product of two ReLUs"


def test_other_remote_code_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    folder = tiny.save_with_tokenizer(tmp_path, tokenizer)
    as_prosparse(folder, 0.0)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"sparsellama"', '"strange"'))
    with pytest.raises(ConfigError, match="can't be loaded"):
        loaded(folder)
