"""What bench.cpu_step makes of its times, what a GGUF file costs a step to read, and loose bars of speed."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels
from bench import cpu_kernels
from bench.cpu_step import row_of
from bench.peers import weights_read
from bench.rounds import in_turn, ratio, sweep


def test_ratios_are_above_one_for_the_faster_and_paired_by_round() -> None:
    times = {
        "HF eager dense": [8.0, 80.0, 8.0],
        "fused dense": [2.0, 20.0, 2.0],
        "fused TEAL": [1.0, 10.0, 1.0],
        "fused TEAL, one thread": [0.5, 5.0, 0.5],
        "llama.cpp Q4_0": [3.0, 30.0, 3.0],
    }
    row = row_of("fused TEAL", 1e6, 16.0, times, [4e6, 4e5, 4e6], ["llama.cpp Q4_0"])
    assert (row["tokens_per_second"], row["milliseconds"], row["megabytes"]) == (1.0, 1000.0, 1.0)
    assert row["roofline_share"] == 0.25, "what the bytes take at the round's own bandwidth, over what it took"
    assert (row["over HF eager dense"], row["over fused dense"], row["over llama.cpp Q4_0"]) == (8.0, 2.0, 3.0)
    assert row["over one thread"] == 0.5


def test_every_call_takes_its_turn_in_each_round_and_the_first_round_is_left_out() -> None:
    turns: list[str] = []

    def turn(name: str) -> int:
        turns.append(name)
        return len(turns)

    assert in_turn({"a": lambda: turn("a"), "b": lambda: turn("b")}, 2) == {"a": [3, 5], "b": [4, 6]}
    assert turns == ["a", "b"] * 3
    assert ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == 3.0


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_is_read_where_it_is_the_head(tmp_path: Path, tied: bool) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    shapes = {"token_embd.weight": (10, 32), "blk.0.ffn_up.weight": (64, 32), "output_norm.weight": (32,)}
    for name, shape in (shapes if tied else shapes | {"output.weight": (10, 32)}).items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float16 if name.startswith("blk") else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size, bits = weights_read(tmp_path / "a.gguf")
    assert size == 10 * 32 * 4 + 64 * 32 * 2
    assert bits == pytest.approx(8 * size / (10 * 32 + 64 * 32))


@pytest.mark.bench
@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_zeros_that_a_batch_shares_pay(dtype_name) -> None:
    """Loose on purpose: two rows with the same 50 % zeros beat F.linear 1.5 times, our own dense batch 1.15 times."""
    threads, dtype = torch.get_num_threads(), cpu_kernels.DTYPES[dtype_name]
    torch.set_num_threads(1)
    try:
        weights, t = torch.randn(40, 2048, 1536).to(dtype), torch.tensor(0.5)
        x = torch.randn(2, 1, 2048).to(dtype)
        x = x + x.sign()
        x[..., torch.rand(2048) < 0.5] = 0
        calls = [
            lambda i: kernels.column_gemv(x, weights[i], t),
            lambda i: kernels.dense_gemv(x, weights[i]),
            lambda i: F.linear(x, weights[i].view(1536, 2048)),
        ]
        for _ in range(3):  # a neighbour may spoil a run
            own, dense, linear = zip(*([sweep(c, 40)[0] for c in calls] for _ in range(8)), strict=True)
            over = [ratio(list(other[1:]), list(own[1:])) for other in (dense, linear)]
            if over[0] >= 1.15 and over[1] >= 1.5:
                return
        pytest.fail(f"shared 50 %: {over[1]:.2f}x F.linear, {over[0]:.2f}x our own dense batch")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.bench
@pytest.mark.parametrize("dtype_name", ["fp32", "bf16"])
def test_half_zeros_pay(dtype_name) -> None:
    """Loose on purpose, one thread, paired: 50 % zeros beat F.linear 1.5 times and our own 0 % 1.3 times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pool = torch.randn(2**28 // cpu_kernels.DTYPES[dtype_name].itemsize).to(cpu_kernels.DTYPES[dtype_name])
        for _ in range(3):  # a neighbour may spoil a run
            rows = cpu_kernels.measure("1.1B", "up", pool, dtype_name, rounds=7)
            none, half = (next(r for r in rows if r.kernel == "column_gemv" and r.zeros_percent == z) for z in (0, 50))
            over_linear, over_zero = half.over_linear, none.microseconds / half.microseconds
            if over_linear >= 1.5 and over_zero >= 1.3:
                return
        pytest.fail(f"50 %: {over_linear:.2f}x F.linear, {over_zero:.2f}x our own 0 %")
    finally:
        torch.set_num_threads(threads)
