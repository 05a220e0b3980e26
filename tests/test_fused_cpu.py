"""The fused CPU step: every method whose selection kernels can run, and that it gives way where it must."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache

from harness.errors import UnsupportedError
from harness.execution.attach import attached
from harness.execution.changes import Moved, Turned, changed
from harness.execution.check import KernelMismatchError
from harness.execution.fused_check import check_fused
from harness.execution.fused_cpu import PER_LAYER, fused_decode, packed_weights, panel_of, unfit_methods
from harness.model.families import view_of
from harness.model.selection import Mask, TopK
from harness.model.step import Policy
from kernels.cpu.step import BEFORE
from methods.rsparse import RSparse
from methods.scap import Scap
from methods.teal import Teal
from tests import tiny
from tests.matrix import CASES

REFUSED = {  # by (part of) the sentence
    "kv_skip_norm": "has no kernel",
    "attribution": "has no kernel",
    "relu_stage2": "hooks of its own",
    "kv_skip": "holes in the cache",
    "kv_skip_zeros": "holes in the cache",
    "kv_recompute": "holes in the cache",
    "kv_mask_output": "holes in the cache",
    "polar": "holes in the cache",
    "polar_norm": "only masked execution",
    "skip_softmax": "holes in the cache",
    "sirius": "corrections rewrite the KV cache",
    "statistical_topk": "no kernel for the activation",
    "statistical_topk_shift": "no kernel for the activation",
    "meangate": "no kernel for the activation",
}


def fitted(name: str, family: str = "llama", **changes):
    view = tiny.view(family, **changes)
    method = CASES[name].make(0.5)
    state = method.fit(view, tiny.calibration(view)) if method.needs != "nothing" else {}
    return view, [(method, state)], Policy(method.phases[0])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "llama" in case.families])
def test_every_method(name: str) -> None:
    view, methods, policy = fitted(name)
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            check_fused(view, methods, policy, tiny.tokens(1, 24))
        return
    found = check_fused(view, methods, policy, tiny.tokens(1, 24))
    assert found.part < 2e-6 and found.logits < 1e-4


@pytest.mark.parametrize("name", ["statistical_topk", "meangate"])
def test_an_activation_of_a_methods_own_is_refused_on_qwen_too(name: str) -> None:
    view, methods, policy = fitted(name, "qwen2")
    with pytest.raises(UnsupportedError, match=REFUSED[name]):
        check_fused(view, methods, policy, tiny.tokens(1, 24))


@pytest.mark.parametrize(
    ("vocabulary", "panel"), [(49152, 2048), (151936, 2374), (128256, 2004), (50257, 1733), (259, 259), (64, None)]
)
def test_panels_of_a_head_divide_it_and_are_neither_narrow_nor_padded_much(vocabulary: int, panel: int | None) -> None:
    assert panel_of(vocabulary, 4) == panel_of(vocabulary, 8) == panel


@pytest.mark.parametrize(
    "name", ["teal", "topk", "wina", "cats", "dejavu", "dejavu_heads", "griffin", "oracle_token", "drelu"]
)
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_bf16_and_low_bits(name: str, bits: int | None) -> None:
    view, methods, policy = fitted(name)
    view.model.bfloat16()
    packed = None if bits is None else packed_weights(view, bits, methods)
    assert check_fused(view, methods, policy, tiny.tokens(1, 24), packed).part < 1e-2


CHANGED = ["rsparse", "larosa", "wina_transform", "scap", "scap_median"]  # their rewrites change modules by hooks


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rewrites_declare_runs_in_the_step(name: str, dtype: torch.dtype) -> None:
    view, methods, policy = fitted(name)
    view.model.to(dtype)
    exact = dtype == torch.float32
    before, tokens = steps(view), range(3, 12)
    found = check_fused(view, methods, policy, tiny.tokens(1, 24), steps=8)
    assert found.part < (2e-6 if exact else 1e-2)
    assert found.logits < (1e-4 if exact else 0.5), "in bf16 decisions move, TEAL's as much"
    with methods[0][0].rewrite(view, methods[0][1]):  # and with none to move
        module = steps(view, tokens)
        with fused_decode(view) as fused:
            ours = steps(view, tokens)
        assert fused.fused == len(tokens)
    assert ((ours - module).norm() / module.norm()).item() < (1e-5 if exact else 3e-2)
    assert torch.equal(steps(view), before), "the module is as it was"


@torch.no_grad()
@pytest.mark.parametrize("name", ["larosa", "larosa_none", "topk", "dip", "wina", "wina_threshold", "teal", "scap"])
def test_sizes_and_fixed_weights_are_compared_in_one_call(name: str) -> None:
    view, methods, policy = fitted(name)
    with fused_decode(view, methods, policy) as fused:
        assert not fused.stops


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["prox", "combined_copy"])
def test_a_copy_chooses_in_the_step_what_the_method_would(name: str, biased: bool, dtype: torch.dtype) -> None:
    view, methods, policy = fitted(name, mlp_bias=biased)
    if biased:
        for block in view.blocks:
            for module in (block.gate, block.up):
                module.bias.normal_()
    view = view_of(view.model.to(dtype))
    method, state = methods[0]
    chosen = 0
    with fused_decode(view, methods, policy) as fused:
        assert not fused.stops
        plan = method.plan(view, state)
        steps(view)
        fused.step.begin(view.model.get_input_embeddings().weight[77])
        for layer in range(view.n_layers):
            before = layer * PER_LAYER + BEFORE["neurons"]
            fused.run(layer * PER_LAYER, before)
            kept = method.select(plan, "neurons", layer, fused._seen("normed"), None).keep.flatten()
            fused.run(before, before + 2)
            hidden = fused.step.buffer("hidden").clone()
            fused.run(before + 2, (layer + 1) * PER_LAYER)
            assert torch.equal(hidden != 0, kept)
            chosen += int(kept.sum())
    assert 0.2 < chosen / (view.n_layers * view.d_ff) < 0.8


@torch.no_grad()
@pytest.mark.parametrize("score", [lambda x: x, lambda x: x.abs().clamp(max=10), lambda x: x.float().abs() + 1])
def test_other_scores_are_asked_for_at_each_token(score) -> None:
    class Other(Teal):
        def select(self, plan, site, layer, x, step):
            return TopK(score(x), x.shape[-1] // 2)

    view, methods, policy = fitted("teal")
    methods = [(Other(0.5), methods[0][1])]
    with fused_decode(view, methods, policy) as fused:
        assert len(fused.stops) == 4 * view.n_layers
    assert check_fused(view, methods, policy, tiny.tokens(1, 24)).part < 2e-6


@pytest.mark.parametrize("bits", [4, 8])
def test_a_centre_goes_with_low_bits_and_weights_of_its_own_do_not(bits: int) -> None:
    view, methods, policy = fitted("scap_median")
    assert check_fused(view, methods, policy, tiny.tokens(1, 24), packed_weights(view, bits, methods)).part < 4e-3
    for name in ("rsparse", "larosa"):
        view, methods, policy = fitted(name)
        with pytest.raises(UnsupportedError, match="packed ones are the model's"):
            check_fused(view, methods, policy, tiny.tokens(1, 24), packed_weights(view, bits, methods))


def test_changes_that_the_step_can_not_make_are_refused() -> None:
    class Chosen(Scap):
        def select(self, plan, site, layer, x, step):
            return Mask(x.abs() > x.abs().median())

    view, methods, policy = fitted("scap")
    state = methods[0][1]
    for nest, sentence in (
        ([(Chosen(0.5), state)], "by their size only"),
        ([*methods, *fitted("dejavu_heads")[1]], "no neurons or heads"),
        ([(RSparse(0.5, remainder=0.1), fitted("rsparse")[1][0][1]), *methods], "one site"),
    ):
        with pytest.raises(UnsupportedError, match=sentence), fused_decode(view, nest, policy):
            pass
    with changed(view.blocks[0].up, Moved(0.1)), changed(view.blocks[0].up, Moved(0.2)):
        with pytest.raises(UnsupportedError, match="hooks of its own"), fused_decode(view):
            pass
    with changed(view.blocks[0].up, Turned(torch.eye(view.d_ff))):  # of a norm it would be one
        with pytest.raises(UnsupportedError, match="hooks of its own"), fused_decode(view):
            pass


@pytest.mark.parametrize("bits", [None, 4])
def test_biases_and_other_heads(bits: int | None) -> None:
    """Biases in every projection (llama), a head size of its own (mistral), biases in q, k, v only (qwen2)."""
    llama_like = tiny.view("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    qwen = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    for layer in qwen.model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            module.bias.normal_()
    for view in (llama_like, tiny.view("mistral"), view_of(qwen)):
        method = Teal(0.4)
        state = method.fit(view, tiny.calibration(view))
        for methods in ([], [(method, state)]):
            packed = None if bits is None else packed_weights(view, bits, methods)
            check_fused(view, methods, Policy(), tiny.tokens(1, 24), packed)


def steps(view, tokens=(3, 77, 200)) -> torch.Tensor:
    cache = StaticCache(config=view.model.config, max_cache_len=32)
    out = [view.model(tiny.tokens(1, 20), past_key_values=cache, use_cache=True, logits_to_keep=1).logits]
    for token in tokens:
        ids = torch.tensor([[token]])
        out.append(view.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits)
    return torch.cat(out, 1)


@torch.no_grad()
def test_the_module_is_as_before_and_the_cache_is_its_own() -> None:
    view, methods, policy = fitted("teal")
    before = steps(view)
    with attached(view, methods, policy):
        masked = steps(view)
    packed = packed_weights(view, 4)
    for low_bit in (None, packed):
        with fused_decode(view, methods, policy, low_bit) as fused:
            ours = steps(view)
            assert fused.fused == 3
            again = steps(view)  # another cache
        assert torch.equal(ours, again)
        if low_bit is None:
            torch.testing.assert_close(ours, masked, rtol=1e-4, atol=1e-4)
    assert torch.equal(steps(view), before)
    assert view.model.get_output_embeddings().weight is view.model.get_input_embeddings().weight


@torch.no_grad()
def test_a_cache_goes_on_in_the_module_where_the_step_left_it() -> None:
    view = tiny.view("llama")
    cache = StaticCache(config=view.model.config, max_cache_len=32)
    tokens = tiny.tokens(1, 24)
    whole = view.model(tokens).logits
    with fused_decode(view):
        view.model(tokens[:, :20], past_key_values=cache, use_cache=True)
        for i in range(20, 23):
            view.model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
    last = view.model(tokens[:, 23:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(last[:, -1], whole[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("bits", [None, 4])
def test_threads_that_help_change_no_bit(bits) -> None:
    """Wide enough that every projection is shared out; who runs a part must not matter."""
    torch.manual_seed(0)
    view = tiny.view("llama", hidden_size=256, intermediate_size=512)
    methods: list = [(Teal(0.3), Teal(0.3).fit(view, tiny.calibration(view)))]
    packed = None if bits is None else packed_weights(view, bits, methods)
    threads, logits = torch.get_num_threads(), {}
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for asked in (False, True, None):
                with fused_decode(view, methods, packed=packed) as fused:
                    fused.step.help(asked)
                    logits[number, asked] = steps(view, range(3, 15))
                    assert fused.fused == 12 and (asked is None or fused.step.helped == asked)
    finally:
        torch.set_num_threads(threads)
    for number in (1, 2, 3):
        assert torch.equal(logits[number, True], logits[number, False])
        assert torch.equal(logits[number, True], logits[number, None])
    torch.testing.assert_close(logits[1, True], logits[3, True], rtol=0, atol=1e-4 if bits is None else 0.1)
    assert bits or not torch.equal(logits[1, True], logits[3, True]), "the work was shared out"


@torch.no_grad()
def test_what_it_does_not_know_takes_the_modules_own_path() -> None:
    view, methods, policy = fitted("teal")
    with fused_decode(view, methods, policy) as fused:
        view.model(tiny.tokens(2, 1), use_cache=True)  # two sequences, and no static cache
        batch = StaticCache(config=view.model.config, max_cache_len=8)
        view.model(tiny.tokens(2, 4), past_key_values=batch, use_cache=True)
        view.model(tiny.tokens(2, 1), past_key_values=batch, use_cache=True)
        assert fused.fused == 0
    with fused_decode(view, methods, Policy(dense_prefix=100)) as fused:
        dense = steps(view)
        assert fused.fused == 0  # these tokens stay dense
    torch.testing.assert_close(dense, steps(view))


def test_a_full_cache_is_an_error() -> None:
    view = tiny.view("llama")
    with torch.no_grad(), fused_decode(view):
        cache = StaticCache(config=view.model.config, max_cache_len=4)
        view.model(tiny.tokens(1, 4), past_key_values=cache, use_cache=True)
        with pytest.raises(IndexError, match="full"):
            view.model(tiny.tokens(1, 1), past_key_values=cache, use_cache=True)


def test_who_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Llama-like"), fused_decode(tiny.view("opt")):
        pass
    with pytest.raises(UnsupportedError, match="sliding"), fused_decode(tiny.view("mistral", sliding_window=8)):
        pass
    view, methods, _ = fitted("teal")
    assert "one site" in unfit_methods([*methods, *methods])


def test_the_check_can_fail(monkeypatch) -> None:
    """A step that drops other channels than the masks is found out."""
    view, methods, policy = fitted("teal")
    own = Teal.select

    def other(self, plan, site, layer, x, step):
        found = own(self, plan, site, layer, x, step)
        asked = step.input_ids is None  # the fused step asks outside of a forward pass
        return {} if asked and site == "mlp_hidden" else found

    monkeypatch.setattr(Teal, "select", other)
    with pytest.raises(KernelMismatchError, match="a part differs"):
        check_fused(view, methods, policy, tiny.tokens(1, 24))
