"""Low-bit products on a CPU by themselves: int8 and int4 columns and rows, dense and at 50 %, on MLP shapes.

    python -m bench.cpu_lowbit --out results/bench/cpu_lowbit.json

One thread, whose CPU time is the clock. Each measurement sweeps matrices that together are larger than any cache. In
each round every call and one plain read of as many bytes take their turn; ratios are paired by round, figures are
medians. A row is compared with the same layout, dense.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.cpu_kernels import HIDDEN, scaled_input, some
from bench.record import where, write
from bench.rounds import in_turn, ratio, sweep
from kernels import lowbit
from kernels.cpu import instruction_set, stream

POOL = 3 * 2**27  # bytes of low-bit lines that a kernel sweeps, so that no cache helps
GOALS = {8: 1.5, 4: 1.4}  # of half_over_dense


def packed_pool(k: int, n: int, bits: int) -> list[lowbit.Packed]:
    """Matrices of k lines that together are larger than any cache: one is quantised, the others share its numbers."""
    first = lowbit.pack(torch.randn(k, n), bits)
    copies = max(2, POOL // first.codes.nbytes)
    return [lowbit.Packed(first.codes.clone(), first.peaks, bits, n) for _ in range(copies)]


def calls_of(what: str, pool: list[lowbit.Packed], k: int, n: int) -> dict[str, Callable[[int], Any]]:
    """Dense and at 50 %, by the number of the matrix; checked against the definition."""
    if what.startswith("columns"):
        half = torch.tensor(1.0)
        x = [scaled_input(k, 50, torch.float32) for _ in pool]
        calls: dict[str, Callable[[int], Any]] = {
            "dense": lambda i: lowbit.columns(x[i], pool[i]),
            "50 %": lambda i: lowbit.columns(x[i], pool[i], half),
        }
        expected = lowbit.reference_columns(x[0], pool[0], half)
    else:
        x = [torch.randn(1, 1, n) for _ in pool]
        lists = [some(k, 50) for _ in pool]
        calls = {
            "dense": lambda i: lowbit.rows(x[i], pool[i]),
            "50 %": lambda i: lowbit.rows(x[i], pool[i], lists[i]),
        }
        expected = lowbit.reference_rows(x[0], pool[0], lists[0])
    assert (calls["50 %"](0) - expected).norm() < 1e-4 * expected.norm(), "the kernel differs from its definition"
    return calls


def kernel_rows(model: str, bits: int, rounds: int) -> list[dict[str, Any]]:
    """Columns of up and down, rows of up."""
    hidden, neurons = HIDDEN[model]
    rows = []
    for what, k, n in (
        ("columns up", hidden, neurons),
        ("columns down", neurons, hidden),
        ("rows up", neurons, hidden),
    ):
        pool = packed_pool(k, n, bits)
        calls = calls_of(what, pool, k, n)
        buffer = torch.ones(len(pool) * pool[0].codes.nbytes // 4)
        sweeps = {"read": partial(sweep, lambda _, b=buffer: stream(b), 1)}
        sweeps |= {name: partial(sweep, call, len(pool)) for name, call in calls.items()}
        found = in_turn(sweeps, rounds)
        times = {name: [seconds / len(pool) for seconds, _ in each] for name, each in found.items()}
        row = {
            "model": model,
            "kernel": what,
            "bits": bits,
            "dense_us": round(1e6 * statistics.median(times["dense"]), 1),
            "half_us": round(1e6 * statistics.median(times["50 %"]), 1),
            "half_over_dense": ratio(times["dense"], times["50 %"]),
            "dense_roofline": ratio(times["read"], times["dense"]),
            "half_roofline": round(ratio(times["read"], times["50 %"]) / 2, 3),
            "goal": GOALS[bits],
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="+", choices=HIDDEN, default=list(HIDDEN))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = [row for model in args.models for bits in (8, 4) for row in kernel_rows(model, bits, args.rounds)]
    result: dict[str, Any] = {"environment": where(), "instruction_set": instruction_set(), "kernels": rows}
    result["load_average"] = [round(load, 2), round(os.getloadavg()[0], 2)]
    if args.out:
        write(args.out, result)


if __name__ == "__main__":
    main()
