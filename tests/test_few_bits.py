"""A copy in few bits as a GPU reads it for one token, against its values in float64 and against plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness.execution.attach import attached
from harness.execution.capture import no_host_reads, not_captured
from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.few_bits import FewBits, magnitudes
from harness.model.step import Policy
from kernels import few_bits
from methods.prox import Prox
from tests import tiny
from tests.interpreter import ROUNDING, error, gpu, interpreted, run_interpreted, starts_it

CUTS = (-1.0, 0.0, 0.5, 100.0)  # all inputs, all that are not zero, some, none


@starts_it
def test_in_the_interpreter():
    run_interpreted(__file__)


def codes_of(copy: FewBits, bits: int) -> torch.Tensor:
    return (copy.values.float() / copy.scale[:, None]).round()


def on_gpu(copy: FewBits | None, bits: int) -> FewBits | None:
    """The copy with its codes as a GPU has them, on whatever device."""
    return None if copy is None else replace(copy, codes=few_bits.pack(codes_of(copy, bits), copy.scale, bits))


@starts_it
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "d"), [(5, 7), (128, 64), (200, 96)])
def test_codes_are_the_copys_and_have_few_bits(bits, n, d):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, d), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(n, generator=torch.Generator().manual_seed(1)) + 0.5
    packed = few_bits.pack(codes.bfloat16(), scale, bits)
    assert torch.equal(packed.values(), codes.float() * scale[:, None])
    assert packed.codes.dtype == torch.int32 and packed.codes.is_contiguous() and packed.codes.shape[0] == d
    assert 0 <= packed.codes.shape[1] * 32 - n * bits < 32 * few_bits.WORDS, "padded by less than a chunk"
    with pytest.raises(ValueError, match="4 or 8 bits"):
        few_bits.pack(codes, scale, 3)


def check_product(device: str, dtype: torch.dtype, bits: int, n: int, d: int) -> None:
    generator = torch.Generator().manual_seed(n + bits)
    weight, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((n, d), (n,)))
    x = torch.randn(1, 1, d, generator=generator).to(dtype)
    x[..., ::5] = 0
    copy = on_gpu(FewBits.of(weight.to(device), bits), bits)
    exact = copy.codes.values().double().cpu()
    assert few_bits.fits(x.to(device), copy.codes) and not few_bits.fits(x.to(device).repeat(2, 1, 1), copy.codes)
    assert not few_bits.fits(x.to(device).double(), copy.codes)
    for cut in CUTS:
        kept = torch.where(x.double().abs() > cut, x.double(), 0)
        for added in (None, bias):
            expected = kept @ exact.t() + (0 if added is None else added.double())
            found = copy.product(x.to(device), cut, None if added is None else added.to(device))
            assert found.dtype == dtype and found.shape == (1, 1, n)
            if cut == 100.0 and added is None:
                assert (found == 0).all()
            else:
                assert error(found.cpu(), expected) <= max(2 * ROUNDING[dtype], 1e-5), (cut, added is None)
    # Many tokens and one are decided by the same numbers: what the values are rounded to is all that differs.
    alone, together = (copy.product(x.to(device).repeat(rows, 1, 1), 0.5)[:1] for rows in (1, 2))
    assert error(alone, together) <= 1e-2 if dtype != torch.float32 else 1e-5


# Outputs and inputs that fill no tile, and more inputs than one program sums.
SHAPES = [(5, 7), (200, 96), (131, 170)]


@interpreted
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_one_token_by_codes(bits, dtype, n, d):
    check_product("cpu", dtype, bits, n, d)


@interpreted
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tile", [(8, 4, 48), (16, 1, 32), (4, 2, 512)])
def test_every_cut_of_the_work_gives_the_same(bits, tile):
    from kernels.cuda import few_bits_product as kernel

    torch.manual_seed(0)
    gate, up = (on_gpu(FewBits.of(torch.randn(150, 210), bits), bits).codes for _ in range(2))
    x = torch.randn(1, 210)
    kept = torch.where(x.abs() > 0.3, x, 0).double()
    found = kernel(x, gate, up, 0.3, None, tile=tile)
    assert found.shape == (2, 1, 150)
    for part, weight in zip(found, (gate, up), strict=True):
        assert error(part, kept @ weight.values().double().t()) <= 1e-5


@interpreted
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_below_the_cut_is_not_read(bits):
    """Other codes there change nothing, not one bit; a NaN among the inputs is not lost."""
    torch.manual_seed(0)
    copy = on_gpu(FewBits.of(torch.randn(70, 64), bits), bits)
    x = torch.randn(1, 64)
    x[:, 3] = 0.5
    other = copy.codes.codes.clone()
    other[x[0].abs() <= 0.5] = -1
    unread = replace(copy, codes=replace(copy.codes, codes=other))
    assert torch.equal(copy.product(x, 0.5), unread.product(x, 0.5))
    assert not torch.equal(copy.product(x, 0.4), unread.product(x, 0.4))
    x[:, 7] = torch.nan
    assert copy.product(x, 0.5).isnan().all()


class Shifted(nn.Module):
    """An activation that no kernel knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x - 0.1)


def check_magnitudes(device: str, dtype: torch.dtype, act: nn.Module, gated: bool, biased: bool, bits: int) -> None:
    n, d = 150, 90
    generator = torch.Generator().manual_seed(0)
    plain = [FewBits.of(torch.randn(n, d, generator=generator).to(dtype).to(device), bits) for _ in range(2)]
    gate, up = (on_gpu(copy, bits) for copy in plain)
    biases = [torch.randn(n, generator=generator).to(dtype).to(device) if biased else None for _ in range(2)]
    x = torch.randn(1, 1, d, generator=generator).to(dtype).to(device)
    for cut in CUTS:
        kept = torch.where(x.double().abs() > cut, x.double(), 0)
        gates, ups = (
            (kept @ copy.codes.values().double().t() + (0 if bias is None else bias.double())).to(dtype)
            for copy, bias in zip((gate, up), biases, strict=True)
        )
        expected = (act(gates) * ups).abs() if gated else act(ups).abs()
        found = magnitudes(x, gate if gated else None, up, act, cut, biases[0] if gated else None, biases[1])
        assert found.dtype == dtype and found.shape == (1, 1, n) and not (found < 0).any()
        if not biased and cut == 100.0:
            assert torch.equal(found, act(torch.zeros_like(found)).abs() * (not gated))
        else:  # values near a rounding edge may fall to either side, before the activation and after it
            assert error(found, expected) <= max(4 * ROUNDING[dtype], 2e-5), cut


ACTS = [nn.SiLU(), nn.ReLU(), Shifted()]


@interpreted
@pytest.mark.parametrize("act", ACTS, ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (True, True), (False, True), (False, False)])
def test_magnitudes_in_one_pass(act, dtype, gated, biased):
    check_magnitudes("cpu", dtype, act, gated, biased, 4)


@interpreted
def test_magnitudes_wait_for_nothing_and_ask_each_kernel_once(monkeypatch):
    torch.manual_seed(0)
    gate, up = (on_gpu(FewBits.of(torch.randn(96, 64), 4), 4) for _ in range(2))
    called = []
    kernel = few_bits._kernel
    monkeypatch.setattr(few_bits, "_kernel", lambda *args: called.append(args) or kernel(*args))
    x = torch.randn(1, 1, 64)
    with no_host_reads():
        found = magnitudes(x, gate, up, nn.SiLU(), 0.4)
    assert len(called) == 1, "gate and up in the same launches"
    magnitudes(x, gate, up, Shifted(), 0.4)
    assert len(called) == 2
    magnitudes(x.repeat(2, 1, 1), gate, up, nn.SiLU(), 0.4)
    assert len(called) == 2, "a batch is decided by the values"
    assert torch.equal(found, magnitudes(x, gate, up, nn.SiLU(), 0.4)), "bit for bit"


@interpreted
def test_prox_chooses_the_same_neurons_by_codes_as_by_values():
    view = tiny.view("llama")
    method = Prox(0.5)
    plan = method.plan(view, method.fit(view, tiny.calibration(view)))
    by_codes = [(replace(c, gate=on_gpu(c.gate, 4), up=on_gpu(c.up, 4)), level) for c, level in plan]
    assert type(plan[0][0].act).__name__ in ("SiLU", "SiLUActivation")
    x = torch.randn(10, 1, view.d_model, generator=torch.Generator().manual_seed(1))
    together = method.select(plan, "neurons", 0, x, None).keep
    alone = torch.cat([method.select(by_codes, "neurons", 0, row[None], None).keep for row in x])
    scores = method.score(plan, "neurons", 0, x, None)
    assert 0.3 < alone.float().mean() < 0.7
    assert ((scores[together != alone] / plan[0][1] - 1).abs() < 1e-4).all(), "but for neurons on the cut"


@starts_it
def test_where_no_kernel_is_values_decide(monkeypatch):
    """Without Triton, or for a dtype that it does not take."""
    torch.manual_seed(0)
    gate, up = (FewBits.of(torch.randn(96, 64), 4) for _ in range(2))
    x = torch.randn(1, 1, 64)
    kept = F.hardshrink(x, 0.4)
    expected = (F.silu(F.linear(kept, gate.values)) * F.linear(kept, up.values)).abs()
    monkeypatch.setattr(few_bits, "cuda_function", lambda name: None)
    assert not few_bits.available()
    found = magnitudes(x, on_gpu(gate, 4), on_gpu(up, 4), nn.SiLU(), 0.4)
    assert torch.equal(found, expected)
    torch.testing.assert_close(magnitudes(x, gate, up, nn.SiLU(), 0.4), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("cut", "read"), [(0.3001, False), (0.299, True)])
def test_an_input_at_the_rounded_cut_is_dropped_alone_as_in_a_batch(cut, read):
    """0.3001 is 0.30078125 in bfloat16, and 0.299 is 0.298828125."""
    view = tiny.view("llama")
    view.model.to(torch.bfloat16)
    copy = Prox(0.5).copies(view, torch.full((view.n_layers,), cut))[0]
    x = torch.full((1, 1, view.d_model), 0.30078125).bfloat16()
    for inputs in (x, x.repeat(2, 1, 1)):
        assert bool((copy.up.product(inputs, copy.cut) != 0).any()) == read


# --- on a GPU


@gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [*SHAPES, (1536, 576), (11008, 4096)])
def test_one_token_by_codes_on_a_gpu(bits, dtype, n, d):
    check_product("cuda", dtype, bits, n, d)


@gpu
def test_an_input_at_the_rounded_cut_is_dropped_as_in_a_batch():
    """Not on the interpreter, which truncates: 0.3001 is rounded up to 0.30078125 in bfloat16."""
    copy = FewBits.of(torch.randn(96, 64, device="cuda").bfloat16(), 4)
    x = torch.full((1, 1, 64), 0.30078125, device="cuda").bfloat16()
    assert (copy.product(x, 0.3001) == 0).all() and (copy.product(x.repeat(2, 1, 1), 0.3001) == 0).all()
    assert (copy.product(x, 0.299) != 0).any()  # 0.298828125 in bfloat16


@gpu
@pytest.mark.parametrize("act", ACTS, ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_magnitudes_on_a_gpu(act, dtype, bits):
    for gated in (True, False):
        for biased in (True, False):
            check_magnitudes("cuda", dtype, act, gated, biased, bits)


@gpu
def test_prox_on_a_gpu_chooses_as_values_do_and_is_captured():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    view = view_of(LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False))
    text = torch.randint(0, 2048, (4, 128), generator=torch.Generator().manual_seed(1))
    method = Prox(0.5)
    state = method.fit(view, Calibration(view, text.split(2)))
    plan = method.plan(view, state)
    x = torch.randn(64, 1, 512, device="cuda").bfloat16()
    for layer, (copy, level) in enumerate(plan):
        assert isinstance(copy.up.codes, few_bits.Channels) and copy.up.values.is_cuda
        together = method.select(plan, "neurons", layer, x, None).keep
        alone = torch.cat([method.select(plan, "neurons", layer, row[None], None).keep for row in x])
        scores, unlike = method.score(plan, "neurons", layer, x, None).float(), together != alone
        # Values are rounded to bfloat16, codes are not: what is decided otherwise lies near the threshold.
        assert unlike.float().mean() < 2e-2
        assert ((scores[unlike] - level).abs() <= 0.05 * max(level, scores.median().item())).all()
    one = x[:1]
    with no_host_reads():
        want = method.select(plan, "neurons", 0, one, None).keep
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        method.select(plan, "neurons", 0, one, None)
    torch.cuda.current_stream().wait_stream(side)
    given, graph = torch.zeros_like(one), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = method.select(plan, "neurons", 0, given, None).keep
    for row in (one, x[1:2]):
        given.copy_(row)
        graph.replay()
        assert torch.equal(found, method.select(plan, "neurons", 0, row, None).keep), "the graph decides anew"
    assert torch.equal(want, method.select(plan, "neurons", 0, one, None).keep), "and always the same"
    assert not_captured(view, lambda: attached(view, [(method, state)], Policy()), text[:1].cuda()) is None
