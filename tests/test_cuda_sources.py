"""The CUDA C++ kernels of kernels/cuda/csrc, compiled for the CPU (tests/cuda_on_host.h): bf16, tiny shapes.

Each variant is a compilation and some hundred threads: seconds, so that all but one are slow tests.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from kernels.cuda import chain, choose, nvrtc, packed, strips
from kernels.cuda.packed import RowTile, Tile

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
SMALL = Tile(channels=32, warps=2, unroll=4, blocks=1)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9)).item()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("cuda")}


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch, built: dict[str, Any]) -> None:
    def kernel(device: int, name: str, **macros: int) -> Any:
        text = nvrtc.source(name, macros)
        if text not in built:
            at = Path(built["folder"]) / f"{len(built)}"
            call = f"run_({name}, x, y, threads, args);"
            entry = f'\nextern "C" void entry(int x, int y, int threads, void** args) {{ {call} }}'
            at.with_suffix(".cpp").write_text(text + entry)
            header = Path(__file__).parent / "cuda_on_host.h"
            flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-w", "-pthread", "-include", str(header)]
            subprocess.run(["g++", *flags, "-o", f"{at}.so", f"{at}.cpp"], check=True)
            built[text] = ctypes.CDLL(f"{at}.so").entry
        return built[text]

    def launch(function: Any, grid: tuple[int, int], threads: int, args: list, **_: Any) -> None:
        values = [
            ctypes.c_void_p(None if a is None else a.data_ptr())
            if a is None or isinstance(a, Tensor)
            else ctypes.c_float(a)
            if isinstance(a, float)
            else ctypes.c_int(a)
            for a in args
        ]
        function(*grid, threads, (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values)))

    monkeypatch.setattr(nvrtc, "kernel", kernel)
    monkeypatch.setattr(nvrtc, "launch", launch)


@pytest.mark.parametrize(
    ("bits", "group", "by_rows"), [(4, 32, False), (4, 128, False), (4, 64, True), (8, 32, False), (8, 128, True)]
)
def test_codes_stand_for_the_weights(bits: int, group: int, by_rows: bool) -> None:
    w = normal(0, 5, 352) * torch.logspace(-4, 2, 5)[:, None]
    w[2] = 0
    p = strips.pack(w, bits, group, by_rows)
    pad = torch.nn.functional.pad
    step = pad(w, (0, -352 % group)).unflatten(1, (-1, group)).abs().amax(-1) / (8 if bits == 4 else 127)
    off = pad((p.values() - w).abs(), (0, -352 % group)).unflatten(1, (-1, group)).amax(-1)
    assert (off <= step * (1.03 if bits == 4 else 0.8)).all()
    assert p.values().shape == w.shape


def weights(bits: int, k: int, n: int, group: int) -> tuple[Any, Tensor]:
    """W^T [k, n] as a kernel takes it, and its values."""
    wt = normal(1, k, n)
    if bits == 16:
        return wt.bfloat16(), wt.bfloat16().float()
    p = strips.pack(wt, bits, group)
    return p, p.values()


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("bits", "group"), [pytest.param(16, 0, marks=slow), pytest.param(8, 32, marks=slow), (4, 128)]
)
def test_columns_skip_what_a_threshold_drops(on_host: None, bits: int, group: int) -> None:
    k, n = 150, 328
    w, values = weights(bits, k, n, group)
    x, t = normal(2, k).bfloat16(), torch.tensor([0.4, 1.1])
    segments = (256, n - 256)
    y, clear = torch.ones(n), torch.ones(70)
    packed.columns(x, w, t, y=y, segments=segments, zero=clear, tile=SMALL)
    kept = [torch.where(x.float().abs() > each, x.float(), 0) for each in t]
    want = torch.cat([kept[0] @ values[:, :256], kept[1] @ values[:, 256:]])
    assert error(y - 1, want) < 3e-5
    assert not clear.any()


@slow
def test_columns_of_a_gated_product_and_a_norm(on_host: None) -> None:
    k, n = 100, 256
    w, values = weights(4, k, n, 128)
    gate, up = normal(3, k), normal(4, k)
    x = (torch.nn.functional.silu(gate.bfloat16()) * up.bfloat16()).float()
    y = packed.columns(gate, w, torch.tensor(0.2), y=torch.zeros(n), up=up, act="silu", tile=SMALL)
    assert error(y, torch.where(x.abs() > 0.2, x, 0) @ values) < 3e-5
    h, weight = 3 * normal(5, k), normal(6, k).bfloat16()
    x = ((h * torch.rsqrt(h.square().mean() + 1e-5)).bfloat16().float() * weight.float()).bfloat16()
    normed = chain.norm(h, weight, 1e-5, torch.empty_like(x), early=1)
    assert error(normed, x) < 4e-3
    y = packed.columns(normed, w, None, y=torch.zeros(n), early=1, tile=SMALL._replace(along=True))
    assert error(y, normed.float() @ values) < 3e-5


@slow
@pytest.mark.parametrize("bits", [16, 4])
def test_listed_channels(on_host: None, bits: int) -> None:
    k, n = 90, 256
    w, values = weights(bits, k, n, 128)
    idx = torch.randperm(k, generator=torch.Generator().manual_seed(0))[:50].int()
    h = normal(7, 50).bfloat16()
    count = torch.tensor(41, dtype=torch.int32)
    y = packed.columns(h, w, y=torch.zeros(n), idx=idx, count=count, by_position=True, tile=SMALL)
    assert error(y, h[:41].float() @ values[idx[:41].long()]) < 3e-5


@slow
@pytest.mark.parametrize(("bits", "group"), [(16, 0), (8, 128), (4, 32)])
def test_neurons_and_rows(on_host: None, bits: int, group: int) -> None:
    n, k = 20, 328
    gate, up = normal(8, n, k) * k**-0.5, normal(9, n, k) * k**-0.5
    pair = [w.bfloat16() if bits == 16 else strips.pack(w, bits, group, by_rows=True) for w in (gate, up)]
    values = [w.float() if isinstance(w, Tensor) else w.values() for w in pair]
    x = normal(10, k).bfloat16()
    tile = RowTile(rows=2, warps=2, unroll=2, blocks=1)
    y = packed.rows(x, pair[0], y=torch.full((n,), torch.nan), tile=tile)
    assert error(y, values[0] @ x.float()) < 3e-5
    idx = torch.tensor([3, 19, 0, 7, 11], dtype=torch.int32)
    h = torch.full((5,), torch.nan, dtype=torch.bfloat16)
    packed.rows(x, pair[0], w_up=pair[1], y=h, act="silu", idx=idx, tile=tile)
    g, u = ((v @ x.float()).bfloat16()[idx.long()] for v in values)
    assert error(h, torch.nn.functional.silu(g) * u) < 1e-2


@slow
@pytest.mark.parametrize(("heads", "groups", "d", "length", "cut"), [(2, 1, 32, 75, (2, 3)), (1, 1, 128, 40, (2, 1))])
def test_attention_of_a_step(on_host: None, heads: int, groups: int, d: int, length: int, cut: tuple[int, int]) -> None:
    qkv = normal(11, (heads + 2 * groups) * d)
    angle = normal(12, d // 2).repeat(2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    cache = [normal(seed, 1, groups, 96, d).bfloat16() for seed in (13, 14)]
    out = torch.empty(heads * d, dtype=torch.bfloat16)
    scratch = chain.Scratch(heads, d, 300, torch.device("cpu"), cut)
    own = [c.clone() for c in cache]
    counted = torch.tensor(length)
    parts = qkv.split((heads * d, groups * d, groups * d))
    chain.attend(*parts, cos, sin, *own, counted, out, scratch, n_heads=heads, scale=d**-0.5)
    q, k, v = (part.bfloat16().unflatten(0, (-1, d)) for part in parts)

    def rotated(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[:, d // 2 :], x[:, : d // 2]], 1) * sin

    cache[0][0, :, length], cache[1][0, :, length] = rotated(k), v
    assert torch.equal(own[0][:, :, : length + 1], cache[0][:, :, : length + 1])
    assert torch.equal(own[1], cache[1])
    want = kernels.reference.decode_attention(
        rotated(q)[None, :, None].float(), cache[0].float(), cache[1].float(), torch.tensor(length + 1)
    )
    assert error(out, want.flatten()) < 5e-3
    assert not scratch.arrived.any()


ONE_BLOCK = {
    "vocab_size": 32, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def without_a_bias(block: Any, of: Any) -> dict[str, list[Tensor]]:
    """By projection that has one, what `of` gives while that bias alone is zero."""
    found = {}
    for name, module in block.projections():
        if module.bias is not None:
            own, module.bias.data = module.bias.data, torch.zeros_like(module.bias)
            found[name] = of()
            module.bias.data = own
    return found


@slow
@pytest.mark.parametrize("biased", ["", "qkv", "all"])
@pytest.mark.parametrize("layout", ["columns", "rows"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_chained_block_equals_the_masked_module(on_host: None, bits: int, layout: str, biased: str) -> None:
    """On the values that the codes stand for, at a cache of 37 tokens; afterwards the module is as it was.

    biased: no projection has a bias, q, k and v as in a Qwen2, or all of them as some methods leave a model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, StaticCache

    from harness.execution.chained_step import Format, chained, no_chained_step, step_weights
    from harness.model.families import view_of

    torch.manual_seed(0)
    config: Any = (Qwen2Config if biased == "qkv" else LlamaConfig)(**ONE_BLOCK)
    model = (Qwen2ForCausalLM if biased == "qkv" else LlamaForCausalLM)(config).eval().bfloat16()
    for weight in model.parameters():
        weight.data *= 5  # what a block adds is to be larger than the rounding of the residual stream
    view = view_of(model)
    sizes = {"q": 2, "k": 2, "v": 2, "o": 5, "gate": 5, "up": 5, "down": 20}  # each shows in what the block does
    for seed, (name, module) in enumerate(view.blocks[0].projections(), start=30):
        if biased == "all" or module.bias is not None:
            own = sizes[name] * normal(seed, module.out_features)
            module.bias = torch.nn.Parameter(own.bfloat16(), requires_grad=False)
    assert no_chained_step(view) is None
    x, position, block = normal(20, 1, 1, 128).bfloat16(), torch.tensor([[37]]), view.blocks[0]
    limits = {} if layout == "rows" else {(name, 0): 0.3 for name, _ in block.projections()}

    def added() -> list[Tensor]:
        """What the block adds to the residual stream, and the token's key and value."""
        cache = StaticCache(config=config, max_cache_len=64)
        cache.layers[0].update(*(normal(seed, 1, 2, 37, 32).bfloat16() for seed in (21, 22)))
        seen = (torch.arange(64) <= 37)[None, None, None]
        rotary = view.model.model.rotary_emb(x, position)
        arguments = {"attention_mask": seen, "position_ids": position, "past_key_values": cache, "use_cache": True}
        y = block.layer(x.clone(), position_embeddings=rotary, **arguments).double() - x.double()
        return [y, cache.layers[0].keys[:, :, 37], cache.layers[0].values[:, :, 37]]

    def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
        return [error(one, other) for one, other in zip(found, expected, strict=True)]

    def drop(module: Any, args: tuple, t: float) -> tuple[Tensor]:
        return (torch.where(args[0].float().abs() <= t, 0, args[0]),)

    with torch.no_grad():
        before = view.model(torch.arange(5)[None]).logits
        with step_weights(view, Format(bits, 128 if bits < 16 else 0, layout)) as weights:  # type: ignore[arg-type]
            hooks = [
                getattr(block, name).register_forward_pre_hook(lambda m, a, t=t: drop(m, a, t))
                for (name, _), t in limits.items()
            ]
            want = added()
            less = without_a_bias(block, added)
            for hook in hooks:
                hook.remove()
            with chained(view, weights, limits, 64, cut=(2, 2)):
                got = added()
        assert max(errors(got, want)) < 5e-2  # roundings, and what they carry past a threshold
        assert len(less) == {"": 0, "qkv": 3, "all": 7}[biased]
        assert all(max(errors(without, want)) > 0.25 for without in less.values())
        assert torch.equal(view.model(torch.arange(5)[None]).logits, before)


@pytest.mark.slow
def test_a_chained_step_passes_the_check_and_a_wrong_one_does_not(
    on_host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the latency probe asks before it times the step: thresholds as masks have them, and other ones."""
    from harness.execution import chained_step
    from harness.execution.block_check import check_blocks
    from harness.execution.chained_step import chained_decode
    from harness.execution.check import KernelMismatchError
    from harness.model.step import Policy
    from harness.probes.latency.plans import static_thresholds
    from methods.teal import Teal
    from tests import tiny

    monkeypatch.setattr(chained_step, "norm_forward", lambda norm: norm.forward)  # Triton's, before the head
    view = tiny.view("llama", hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4)
    for weight in view.model.parameters():
        weight.data *= 5
    view.model.bfloat16()
    # at a low level, or a single value moved over its threshold would weigh much among so few
    methods = [(Teal(0.1), Teal(0.1).fit(view, tiny.calibration(view)))]
    limits = static_thresholds(view, methods)
    prompt = tiny.tokens(1, 12)

    def check(thresholds: Any) -> float:
        return check_blocks(view, methods, Policy(), prompt, lambda: chained_decode(view, thresholds, 64))

    assert check(limits) < 0.1
    assert check_blocks(view, (), Policy(), prompt, lambda: chained_decode(view, {}, 64)) < 2e-2
    wrong = {key: 8 * t for key, t in limits.items()}
    with pytest.raises(KernelMismatchError, match="block 0, sequence 0: the step differs"):
        check(wrong)


@slow
def test_a_method_that_leaves_biases_is_chained_in_the_model_that_it_makes(
    on_host: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SPON over TEAL; the dense chained step stays that of the model as it is."""
    from functools import partial

    from harness.execution import chained_step
    from harness.execution.attach import attached
    from harness.execution.check import KernelMismatchError
    from harness.model.step import Policy
    from harness.probes.latency import chained
    from harness.probes.latency.plans import fused_thresholds, rewritten
    from methods.spon import Spon
    from methods.teal import Teal
    from tests import tiny

    monkeypatch.setattr(chained_step, "norm_forward", lambda norm: norm.forward)  # Triton's, before the head
    monkeypatch.setattr(chained, "no_chain", chained_step.no_chained_step)
    view = tiny.view("llama", hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4)
    for weight in view.model.parameters():
        weight.data *= 5
    view.model.bfloat16()
    teal, spon = Teal(0.1), Spon(0.1, epochs=0)
    methods = [(teal, teal.fit(view, tiny.calibration(view)))]
    with attached(view, methods, Policy()):
        state = spon.fit(view, tiny.calibration(view))
    methods.append((spon, {name: 100 * each for name, each in state.items()}))
    limits = fused_thresholds(view, methods, Policy())
    assert limits is not None
    config = {"context": [12], "new_tokens": 4}
    rewrite, windows = partial(rewritten, view, methods, Policy()), tiny.tokens(1, 12)
    (variant,) = chained.method_chain(view, methods, Policy(), limits, rewrite, 0.9, config, windows)
    assert (variant.execution, variant.engine) == ("kernel", "chained")
    with variant.attached(1) as blocks:
        assert set(blocks[0].biases) == {"qkv", "o", "gate_up", "down"}
    (dense,) = chained.dense_chain(view, config, windows)
    with dense.attached(1) as blocks:
        assert not blocks[0].biases
    with pytest.raises(KernelMismatchError):
        chained.method_chain(
            view, methods, Policy(), limits, partial(rewritten, view, (), Policy()), 0.9, config, windows
        )


def test_biases_lie_where_the_outputs_do() -> None:
    """Zero in the padding of int4 strips and where a projection has none; of a group without any there is none."""
    from harness.execution.chained_step import Format, _block_biases
    from tests import tiny

    view = tiny.view("llama")
    block = view.blocks[0]
    assert block.k is not None and block.v is not None
    block.k.bias = torch.nn.Parameter(torch.ones(block.k.out_features))
    block.up.bias = torch.nn.Parameter(torch.ones(block.up.out_features))
    columns, rows = (_block_biases(view, block, Format(4, 128, layout)) for layout in ("columns", "rows"))  # type: ignore[arg-type]
    assert set(columns) == {"qkv", "gate_up"} and set(rows) == {"qkv", "gate", "up"}
    q, k, v = columns["qkv"].split(256)
    assert torch.equal(k, torch.arange(256) < block.k.out_features) and not q.any() and not v.any()
    assert torch.equal(rows["qkv"].nonzero().flatten(), block.q.out_features + torch.arange(block.k.out_features))
    assert not rows["gate"].any() and rows["up"].all()


@slow
@pytest.mark.parametrize(("bits", "biased", "share"), [(4, False, 0.5), (4, True, 0.0), (8, True, 0.9)])
def test_neurons_are_chosen_by_a_copy_and_listed_in_order(on_host: None, bits: int, biased: bool, share: float) -> None:
    """|up x * act(gate x)| of the inputs above the cut: more blocks than one, and splits of the channels."""
    k, n, most = 300, 600, 2 ** (bits - 1) - 1
    drawn = torch.Generator().manual_seed(3)
    codes = [torch.randint(-most, most + 1, (n, k), generator=drawn) for _ in range(2)]
    scales = tuple((0.5 + torch.rand(n, generator=drawn)) * k**-0.5 / most for _ in range(2))
    both = strips.joined([strips.pack_codes(each.t(), bits) for each in codes])
    assert torch.equal(both.values()[:, :n], codes[0].t().float())
    x, cut = normal(40, k).bfloat16(), torch.tensor([0.5])
    bias = tuple(normal(seed, n).bfloat16() for seed in (41, 42))
    sums = [c.double() @ torch.where(x.abs() > 0.5, x, 0).double() * s for c, s in zip(codes, scales, strict=True)]
    gate, up = ((y + b.double() if biased else y).bfloat16() for y, b in zip(sums, bias, strict=True))
    score = (torch.nn.functional.silu(gate) * up).abs().float()
    t = torch.full((n,), score.quantile(share).item() if share else -1.0)
    chosen = choose.Chosen(both, n, torch.device("cpu"))
    assert len(chosen.sums) > 1
    for _ in range(2):  # the second finds everything as the first did
        choose.choose(x, both, cut, scales, t, chosen, act="silu", biases=bias if biased else None)
    idx = chosen.idx[: chosen.count]
    assert not chosen.arrived and (idx.diff() > 0).all()
    kept = torch.zeros(n, dtype=torch.bool).index_fill(0, idx.long(), True)
    near = (score - t).abs() < 0.02 * score  # a rounding may move it over
    assert torch.equal(kept[~near], (score > t)[~near]) and near.sum() < n / 8


@slow
@pytest.mark.parametrize("name", ["prox", "combined", "spon"])
def test_what_a_copy_chooses_is_chained(on_host: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Prox, alone and below SPON, and `combined` with a copy, against masks; other thresholds are found out."""
    from functools import partial

    from transformers import StaticCache

    from harness.execution import chained_step
    from harness.execution.attach import attached
    from harness.execution.check import KernelMismatchError
    from harness.model.step import Policy
    from harness.probes.latency import chained
    from harness.probes.latency.plans import fused_choice, fused_thresholds, rewritten
    from methods.combined import Combined
    from methods.prox import Prox
    from methods.spon import Spon
    from tests import tiny

    monkeypatch.setattr(chained_step, "norm_forward", lambda norm: norm.forward)  # Triton's, before the head
    monkeypatch.setattr(chained, "no_chain", chained_step.no_chained_step)
    view = tiny.view("llama", hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4)
    for weight in view.model.parameters():
        weight.data *= 3 if weight.dim() > 1 else 1
    view.model.bfloat16()
    inner = Combined(0.1, bits=4, steps=0) if name == "combined" else Prox(0.3)
    methods = [(inner, inner.fit(view, tiny.calibration(view)))]
    if name == "spon":
        spon = Spon(0.3, epochs=0)
        with attached(view, methods, Policy()):
            methods.insert(0, (spon, spon.fit(view, tiny.calibration(view))))  # type: ignore[arg-type]
    assert fused_thresholds(view, methods, Policy()) is None
    found = fused_choice(view, methods, Policy())
    assert found is not None
    limits, guesses = found
    assert {p for p, _ in limits} == ({"q", "k", "v", "o"} if name == "combined" else set())

    def chain(guesses: Any) -> list[Any]:
        rewrite, windows = partial(rewritten, view, methods, Policy()), tiny.tokens(1, 12)
        config = {"context": [12], "new_tokens": 4}
        return chained.method_chain(view, methods, Policy(), limits, rewrite, 0.7, config, windows, guesses)

    (variant,) = chain(guesses)
    assert (variant.execution, variant.engine, variant.reads) == ("kernel", "chained", 0.7)
    assert "chained step equals masked" in variant.columns["message"]
    with variant.attached(1) as blocks, torch.no_grad():
        cache = StaticCache(config=view.model.config, max_cache_len=16)
        for tokens in tiny.tokens(1, 12).split([11, 1], 1):
            view.model(tokens, past_key_values=cache, use_cache=True)
        assert 0 < int(blocks[0].buffers.chosen.count) < view.d_ff
    with pytest.raises(KernelMismatchError):
        chain({layer: (copy, 20 * t) for layer, (copy, t) in guesses.items()})
    copy, t = guesses[0]
    assert not chain({0: (dataclasses.replace(copy, up=dataclasses.replace(copy.up, codes=None)), t)})
