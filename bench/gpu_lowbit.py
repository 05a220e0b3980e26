"""16-bit, int8 and int4 on a GPU: kernels, the MLP of neurons, the whole decode step, and where its time goes.

    python -m bench.gpu_lowbit --out results/bench/gpu_lowbit.json

Kernel times are those of bench/gpu_kernels.py: the median replay of a CUDA graph that runs the kernel on many weight
copies, far more bytes than the L2 cache holds, each with an input of its own; every result is compared with float64 on
the values that the codes stand for before it is timed. `early` says how the kernel lets the next one start (0: not).

Steps are those of bench/gpu_decode.py: `LlamaForCausalLM` at the shape of Llama-2-7B with random weights, thresholds
fitted on random tokens, one CUDA graph a step. Variants that share a weight layout are timed in turn, round after
round. Before that, what single blocks add to the residual stream is compared with the masked module's on the same
values. Floors are bytes of what is kept (codes, scales, head, cache) over the read rate measured in the same run.
"""

# ruff: noqa: B023  (every lambda here runs before its loop goes on)
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.cuda as kc
from bench.gpu_common import HIDDEN, NEURONS, error, timed
from bench.gpu_decode import fit, llama_2_7b
from bench.gpu_lowbit_step import steps
from bench.gpu_report import Report
from harness.execution.chained_step import Format
from kernels.cuda.packed import RowTile, Tile, columns, rows
from kernels.cuda.strips import Strips

SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]  # (outputs, inputs): q/k/v, o, gate/up, down
FORMATS = [(16, 0), (8, 128), (4, 128), (4, 32)]
TILES = {
    16: [Tile(32, 8, 8, 2), Tile(32, 4, 8, 5), Tile(64, 4, 8, 6), Tile(32, 8, 8, 2, True)],
    8: [Tile(64, 4, 16, 4), Tile(64, 4, 16, 4, True), Tile(128, 4, 16, 4), Tile(64, 4, 8, 5), Tile(128, 4, 8, 5)],
    4: [
        Tile(64, 4, 8, 4), Tile(64, 4, 8, 4, True), Tile(128, 4, 8, 4), Tile(128, 4, 8, 4, True), Tile(32, 8, 8, 2),
        Tile(32, 8, 8, 2, True), Tile(256, 4, 8, 4), Tile(128, 2, 8, 8),
    ],
}  # fmt: skip
ROW_TILES = [RowTile(1, 8, 4, 2), RowTile(2, 8, 4, 2), RowTile(2, 8, 2, 3), RowTile(4, 8, 2, 2), RowTile(4, 4, 4, 3)]


def random_strips(lines: int, width: int, bits: int, group: int, by_rows: bool = False) -> Strips:
    """Random codes and scales: as good as quantised weights for times, and quicker."""
    per = 128 // bits
    outputs = -(-width // per) * per if by_rows else 8 * per
    strips = -(-width // outputs)
    codes = torch.randint(0, 256, (strips, lines, outputs * bits // 8), dtype=torch.uint8, device="cuda")
    scales = torch.empty(strips, lines, -(-outputs // group), device="cuda").uniform_(0.5, 1.5)
    return Strips(codes, (scales * lines**-0.5 / 2 ** (bits - 1)).bfloat16(), bits, group, width, by_rows)


class Copies:
    """Rotating copies of one shape in one format, by channel: weights, inputs and accumulators."""

    def __init__(self, n: int, k: int, bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.n, self.k, self.bits, self.group = n, k, bits, group
        size = n * k * bits // 8
        copies = max(6, min(64, 10**9 // size))
        self.w: list[Any] = [
            torch.empty(k, n, dtype=dtype, device="cuda").normal_(0, k**-0.5)
            if bits == 16
            else random_strips(k, n, bits, group)
            for _ in range(copies)
        ]
        self.bytes = self.w[0].nbytes
        self.x = torch.randn(copies, k, device="cuda").to(dtype)
        self.y = torch.zeros(copies, n, device="cuda")
        self.values = self.w[0].double() if bits == 16 else self.w[0].values().double()

    def at(self, zeros: int) -> Tensor | None:
        return None if zeros == 0 else self.x.float().abs().quantile(zeros / 100, dim=1, keepdim=True)

    def want(self, t: Tensor | None) -> Tensor:
        x = self.x[0].float()
        return (x if t is None else torch.where(x.abs() <= t[0], 0, x)).double() @ self.values


def column_table(report: Report, n: int, k: int, bits: int, group: int, tiles: list[Tile]) -> None:
    from kernels.cuda.column import column

    c = Copies(n, k, bits, group)
    facts = {"n": n, "k": k, "bits": bits, "group": group}
    for zeros in (0, 50, 80) if bits == 16 or (bits == 4 and group == 128) else (0, 50):
        t = c.at(zeros)
        want, kept = c.want(t), 1 - zeros / 100

        def base(i: int) -> Any:
            return column(
                c.x[i], c.w[i], None if t is None else t[i], y=c.y[i], accumulate=True, expected_sparsity=zeros / 100
            )

        def own(i: int, tile: Tile, early: int) -> Any:
            return columns(c.x[i], c.w[i], None if t is None else t[i], y=c.y[i], tile=tile, early=early)

        def run(kernel: str, call: Callable[[int], Any], **more: Any) -> None:
            c.y[0].zero_()
            call(0)
            wrong = error(c.y[0], want)
            assert wrong < 1e-4, f"{kernel} {more} is off by {wrong}"
            us = timed([lambda i=i: call(i) for i in range(len(c.w))], 5)
            report.add("column", us, c.bytes * kept, kernel=kernel, zeros=zeros, error=wrong, **facts, **more)

        if bits == 16:
            report.attempt(f"triton {n}x{k} {zeros}", lambda: run("triton", base))
        for tile in tiles:
            for early in (0, 1, 2) if tile in tiles[:2] and group != 32 else (1,):
                report.attempt(
                    f"columns {bits} bits {n}x{k} at {zeros} % {tile} {early}",
                    lambda: run("columns", lambda i: own(i, tile, early), tile=list(tile), early=early),
                )


def row_table(report: Report, n: int, k: int, bits: int, group: int) -> None:
    """Dense row-wise products of a format, and others' dense kernels."""
    size = n * k * bits // 8
    copies = max(6, min(64, 10**9 // size))
    w: list[Any] = [
        torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_(0, k**-0.5)
        if bits == 16
        else random_strips(n, k, bits, group, True)
        for _ in range(copies)
    ]
    x = torch.randn(copies, k, device="cuda").bfloat16()
    y = torch.empty(n, device="cuda")
    values = w[0].double() if bits == 16 else w[0].values().double()
    want = values @ x[0].double()
    bytes_ = w[0].nbytes
    facts = {"n": n, "k": k, "bits": bits, "group": group, "zeros": 0}

    def run(kernel: str, call: Callable[[int], Any], limit: float = 1e-4, **more: Any) -> None:
        y.fill_(torch.nan)
        wrong = error(call(0).flatten(), want)
        assert wrong < limit, f"{kernel} {more} is off by {wrong}"
        us = timed([lambda i=i: call(i) for i in range(copies)], 5)
        report.add("rows", us, bytes_, kernel=kernel, error=wrong, **facts, **more)

    for tile in ROW_TILES:
        for early in (0, 1):
            report.attempt(
                f"rows {bits} {n}x{k} {tile}",
                lambda: run(
                    "rows", lambda i: rows(x[i], w[i], y=y, tile=tile, early=early), tile=list(tile), early=early
                ),
            )
    if bits == 16:
        report.attempt("cublas", lambda: run("cublas", lambda i: F.linear(x[i], w[i]), 5e-3))
        report.attempt("triton rows", lambda: run("triton rows", lambda i: kc.dense_gemv_rows(x[i], w[i]), 5e-3))
    if bits == 4 and group == 128:
        report.attempt("tinygemm", lambda: tinygemm(report, n, k, x, copies, facts))


def tinygemm(report: Report, n: int, k: int, x: Tensor, copies: int, facts: dict[str, Any]) -> None:
    """The int4 product inside torch, which torchao's weight-only int4 calls."""
    packed = [
        torch.ops.aten._convert_weight_to_int4pack(
            torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"), 8
        )
        for _ in range(copies)
    ]
    scales = torch.empty(k // 128, n, 2, device="cuda").uniform_(0, 0.01).bfloat16()

    def call(i: int) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x[i : i + 1], packed[i], 128, scales)

    us = timed([lambda i=i: call(i) for i in range(copies)], 5)
    report.add("rows", us, packed[0].nbytes + scales.nbytes, kernel="tinygemm", **facts)


def mlp_table(report: Report, bits: int, group: int) -> None:
    """The MLP of listed neurons: gate/up by rows, down by channels into the residual stream."""
    from kernels.cuda.column import column_list
    from kernels.cuda.rows import neurons

    size = 3 * NEURONS * HIDDEN * bits // 8
    copies = max(6, min(40, 2 * 10**9 // size))
    dtype = torch.bfloat16

    def made(by_rows: bool) -> Any:
        if bits == 16:
            return torch.empty(NEURONS, HIDDEN, dtype=dtype, device="cuda").normal_(0, HIDDEN**-0.5)
        return random_strips(NEURONS, HIDDEN, bits, group, by_rows)

    w = [(made(True), made(True), made(False)) for _ in range(copies)]
    x = torch.randn(copies, HIDDEN, device="cuda").to(dtype)
    h = torch.empty(NEURONS, dtype=dtype, device="cuda")
    y = torch.zeros(HIDDEN, device="cuda")
    bytes_ = sum(m.nbytes for m in w[0])
    values = [m.double() if bits == 16 else m.values().double() for m in w[0]]
    for inactive in (0, 50, 80):
        m = round(NEURONS * (1 - inactive / 100))
        lists = [torch.randperm(NEURONS, device="cuda")[:m].sort().values.int() for _ in range(copies)]
        at = lists[0].long()
        gate, up = ((values[i][at] @ x[0].double()).to(dtype) for i in range(2))
        want = (F.silu(gate.double()).to(dtype) * up).double() @ values[2][at]

        def own(i: int, tile: RowTile, down: Tile, early: int) -> None:
            idx = lists[i] if inactive else None
            rows(x[i], w[i][0], w_up=w[i][1], y=h, act="silu", idx=idx, tile=tile, early=early)
            columns(h[:m], w[i][2], y=y, idx=idx, by_position=bool(inactive), tile=down, early=early)

        def base(i: int) -> None:
            idx = lists[i]
            neurons(x[i], w[i][0], w[i][1], h=h, act="silu", idx=idx)
            column_list(h, w[i][2], idx, y=y, by_position=True, accumulate=True)

        def run(kernel: str, call: Callable[[int], Any], **more: Any) -> None:
            y.zero_()
            call(0)
            wrong = error(y, want)
            assert wrong < 5e-3, f"{kernel} {more} is off by {wrong}"
            us = timed([lambda i=i: call(i) for i in range(copies)], 5)
            facts = {"bits": bits, "group": group, "inactive": inactive, "error": wrong}
            report.add("mlp", us, bytes_ * m / NEURONS, kernel=kernel, **facts, **more)

        if bits == 16:
            report.attempt(f"mlp triton {inactive}", lambda: run("triton", base))
        best = RowTile(1, 8, 2, 3), Tile(32, 8, 8, 2)
        trials = [(*best, early) for early in (0, 1, 2)]
        trials += [(tile, best[1], 2) for tile in (RowTile(1, 8, 2, 4), RowTile(1, 8, 4, 2), RowTile(1, 4, 2, 8))]
        trials += [(tile, best[1], 2) for tile in (RowTile(1, 4, 4, 5), RowTile(2, 4, 2, 4), RowTile(1, 16, 2, 2))]
        downs = (Tile(32, 4, 8, 5), Tile(32, 4, 8, 5, True), Tile(64, 4, 8, 6), Tile(64, 4, 8, 4), Tile(32, 2, 8, 10))
        trials += [(best[0], down, early) for down in downs for early in (1, 2)]
        for tile, down, early in trials:
            more = {"tile": list(tile), "down": list(down), "early": early}
            report.attempt(
                f"mlp {bits} {inactive} {more}", lambda: run("packed", lambda i: own(i, tile, down, early), **more)
            )


def torchao_baseline(report: Report) -> None:
    import torchao  # noqa: F401  (only to know that it is there)

    report.facts["torchao"] = torchao.__version__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench/gpu_lowbit.json"))
    parser.add_argument("--seconds", type=float, default=230)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--parts", nargs="+", default=["steps", "columns", "mlp", "rows"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs an NVIDIA GPU")
    torch.manual_seed(0)
    report = Report(args.out, args.seconds, __doc__ or "")

    def timed_steps() -> None:
        view = llama_2_7b(torch.bfloat16, args.layers)
        keep_all = {(name, layer): -1.0 for layer, block in enumerate(view.blocks) for name, _ in block.projections()}
        fits = {0.0: ({}, {}), 0.01: (keep_all, {}), 0.5: fit(view, 0.5)}

        def pair(early: int, *how: Any) -> dict[str, Any]:
            name = f"early {early}" + "".join(f", {each}" for each in how if each)
            return {f"dense, {name}": (0.0, early, *how), f"50 %, {name}": (0.5, early, *how)}

        own = {"triton dense": (0.0, None), "triton 50 %": (0.5, None)}
        cuts = pair(1, None, (4, 9)) | pair(1, None, (8, 5)) | pair(1, None, (12, 3))
        int4 = pair(1, (64, 4, 8, 4)) | pair(1, (128, 4, 8, 4)) | pair(1, (32, 8, 8, 2)) | pair(1, (64, 4, 8, 4, True))
        for form, variants in (
            (Format(16), own | pair(0) | pair(1) | pair(2) | cuts | {"0 % kept all, early 1": (0.01, 1)}),
            (Format(4, 128), pair(0) | pair(1) | pair(2) | int4 | cuts),
            (Format(8, 128), pair(0) | pair(1) | pair(2) | pair(1, (64, 4, 16, 4, True))),
            (Format(4, 128, "rows"), {"dense, early 1": (0.0, 1)}),
            (Format(4, 32), pair(1)),
        ):
            report.attempt(f"steps {form}", lambda: steps(report, view, form, variants, fits, 512, args.rounds))
            torch.cuda.empty_cache()

    def column_tables() -> None:
        for bits, group in FORMATS:
            for n, k in SHAPES:
                tiles = TILES[bits][: 2 if group == 32 else None]
                report.attempt(
                    f"columns {bits}/{group} {n}x{k}",
                    lambda: column_table(report, n, k, bits, group, tiles),
                )
                torch.cuda.empty_cache()

    def row_tables() -> None:
        for bits, group in ((4, 128), (8, 128), (16, 0)):
            for n, k in (SHAPES[0], SHAPES[1], SHAPES[3], (32000, 4096)):
                report.attempt(f"rows {bits} {n}x{k}", lambda: row_table(report, n, k, bits, group))
                torch.cuda.empty_cache()

    def mlps() -> None:
        for bits, group in ((16, 0), (4, 128)):
            report.attempt(f"mlp {bits}", lambda: mlp_table(report, bits, group))
            torch.cuda.empty_cache()

    parts = {"steps": timed_steps, "columns": column_tables, "rows": row_tables, "mlp": mlps}
    for name in args.parts:
        start = time.time()
        report.attempt(name, parts[name])
        torch.cuda.empty_cache()
        print(f"{name}: {time.time() - start:.1f} s", flush=True)
    report.attempt("torchao", lambda: torchao_baseline(report))
    report.save()
    for row in report.rows:
        print(json.dumps(row))
    print(json.dumps(report.facts, indent=1))
    print(f"{len(report.failed)} failed: {[f['what'] for f in report.failed]}")


if __name__ == "__main__":
    main()
