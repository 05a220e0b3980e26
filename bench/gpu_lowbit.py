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
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StaticCache

import kernels.cuda as kc
from bench.gpu_common import HIDDEN, NEURONS, error, timed
from bench.gpu_decode import NEW_TOKENS, Masks, dropped_share, fit, llama_2_7b, prefilled
from harness.execution.chained_step import Format, chained, step_weights
from harness.execution.decode_loop import DecodeLoop
from harness.execution.fused_step import FusedBlock, _block_forward, _forward
from harness.model.view import View
from harness.results.environment import environment
from kernels.cuda import packed
from kernels.cuda.packed import RowTile, Tile, columns, default_tile, rows
from kernels.cuda.strips import Strips

SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]  # (outputs, inputs): q/k/v, o, gate/up, down
FORMATS = [(16, 0), (8, 128), (4, 128), (4, 32)]
TILES = {
    16: [Tile(32, 8, 8, 2), Tile(32, 4, 8, 5), Tile(32, 4, 8, 4), Tile(64, 4, 8, 6), Tile(32, 16, 8, 1)],
    8: [Tile(64, 4, 16, 3), Tile(64, 4, 16, 4), Tile(32, 4, 8, 5), Tile(64, 2, 16, 6)],
    4: [
        Tile(32, 8, 8, 2), Tile(32, 4, 8, 4), Tile(64, 4, 8, 4), Tile(64, 8, 8, 2), Tile(32, 4, 8, 5),
        Tile(32, 4, 4, 5), Tile(32, 2, 8, 8), Tile(64, 2, 8, 8), Tile(128, 4, 8, 4),
    ],
}  # fmt: skip
ROW_TILES = [RowTile(1, 8, 4, 2), RowTile(2, 8, 4, 2), RowTile(2, 8, 2, 3), RowTile(4, 8, 2, 2), RowTile(4, 4, 4, 3)]


class Report:
    """What is known so far, written after every addition."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.started, self.seconds = out, time.time(), seconds
        self.rate = kc.read_bandwidth("cuda", 0.3)
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.facts: dict[str, Any] = {}

    def left(self) -> float:
        return self.seconds - (time.time() - self.started)

    def add(self, table: str, us: float, floor_bytes: float, **facts: Any) -> None:
        floor = floor_bytes / self.rate * 1e6
        figures = {"us": us, "floor_us": floor, "added_us": us - floor, "share_of_floor": floor / us}
        self.rows.append({"table": table, **facts, **{k: round(v, 3) for k, v in figures.items()}})

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """Run one piece; a failure is kept with its traceback, and the rest goes on."""
        if self.left() < 0:
            self.failed.append({"what": what, "error": "no time left"})
            return None
        try:
            return call()
        except Exception:
            self.failed.append({"what": what, "error": traceback.format_exc()[-1500:]})
            print(f"FAILED {what}\n{self.failed[-1]['error']}", flush=True)
        finally:
            self.save()
        return None

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "what": __doc__,
            "environment": environment() | {"command": "python -m bench.gpu_lowbit"},
            "device": torch.cuda.get_device_name(),
            "read_bytes_per_s": self.rate,
            "seconds": round(time.time() - self.started, 1),
            **self.facts,
            "failed": self.failed,
            "rows": self.rows,
        }
        self.out.write_text(json.dumps(record, indent=1))


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
            for early in (0, 1, 2) if tile == tiles[0] and group != 32 else (1,):
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
        first = RowTile(1, 8, 4, 2), Tile(32, 8, 8, 2)
        trials = [(*first, 0), (*first, 1), (*first, 2)]
        trials += [(tile, first[1], 1) for tile in (RowTile(1, 8, 8, 1), RowTile(1, 8, 4, 3), RowTile(1, 4, 4, 4))]
        trials += [(tile, first[1], 2) for tile in (RowTile(1, 8, 2, 3), RowTile(1, 16, 4, 1), RowTile(1, 8, 2, 4))]
        trials += [(first[0], down, 2) for down in (Tile(32, 4, 8, 4), Tile(64, 4, 8, 4), Tile(32, 2, 8, 8))]
        for tile, down, early in trials:
            more = {"tile": list(tile), "down": list(down), "early": early}
            report.attempt(
                f"mlp {bits} {inactive} {more}", lambda: run("packed", lambda i: own(i, tile, down, early), **more)
            )


# --- the whole step ------------------------------------------------------------------------------------------------


@torch.no_grad()
def block_outputs(view: View, layers: list[int], x: Tensor) -> dict[int, Tensor]:
    """What single blocks add to the residual stream at a cache of 37 random tokens, float64."""
    position = torch.tensor([[37]], device="cuda")
    rotary = view.model.model.rotary_emb(x, position)
    out = {}
    for layer in layers:
        torch.manual_seed(layer)
        cache = StaticCache(config=view.model.config, max_cache_len=64)
        filled = torch.randn(1, view.n_kv_heads, 37, view.head_dim, device="cuda").to(view.dtype)
        cache.layers[layer].update(filled, filled.flip(-1))
        arguments = {"attention_mask": None, "position_ids": position, "past_key_values": cache, "use_cache": True}
        if view.model.config._attn_implementation == "sdpa":
            arguments["attention_mask"] = (torch.arange(64, device="cuda") <= 37)[None, None, None]
        y = view.blocks[layer].layer(x.clone(), position_embeddings=rotary, **arguments)
        out[layer] = y.double() - x.double()
    return out


@torch.no_grad()
def masked_outputs(view: View, layers: list[int], thresholds: dict, x: Tensor) -> dict[int, Tensor]:
    with Masks(view, 0.0) as masks:
        masks.fitting, masks.thresholds = False, thresholds
        if not thresholds:
            masks.thresholds = {(n, i): -1.0 for i, b in enumerate(view.blocks) for n, _ in b.projections()}
        return block_outputs(view, layers, x)


@contextmanager
def triton_step(view: View, weights: list[Any], thresholds: dict, sparsity: float) -> Iterator[list[Any]]:
    """The fused step of eight launches a block on the same W^T as the chained one."""
    from contextlib import ExitStack

    from harness.execution.fused_step import Buffers, _head_forward, _norm_forward, decode_attention

    buffers = Buffers.of(view, "columns")
    assert view.final_norm is not None
    blocks: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(decode_attention(view.model))
        for layer, block in enumerate(view.blocks):
            merged: dict[str, Any] = {name: (weight, None) for name, weight in weights[layer].items()}
            own = FusedBlock(view, layer, merged, buffers, "columns", thresholds, sparsity)
            blocks.append(own)
            stack.enter_context(_forward(block.layer, _block_forward(block.layer, own, torch.float32)))
        stack.enter_context(_forward(view.final_norm, _norm_forward(view.final_norm)))

        head = view.model.get_output_embeddings()
        stack.enter_context(_forward(head, _head_forward(head)))
        yield blocks


@torch.no_grad()
def kernel_times(loop: DecodeLoop) -> list[dict[str, Any]]:
    """Where a step's time goes: kernels by name, count and microseconds a step, and the step's length on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    steps = 6
    loop.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(steps):
            loop.step()
        torch.cuda.synchronize()
    by_name: dict[str, list[float]] = {}
    spans = []
    for event in p.events():
        if event.device_type.name == "CUDA" and event.device_time > 0:
            by_name.setdefault(event.name[:60], []).append(event.device_time)
            spans.append((event.time_range.start, event.time_range.end))
    busy = [
        {
            "kernel": name,
            "launches": len(t) / steps,
            "us": round(sum(t) / steps, 1),
            "median_us": round(median(t), 2),
            "each": [round(v, 1) for v in t[:8]],
        }
        for name, t in by_name.items()
    ]
    total = (max(e for _, e in spans) - min(s for s, _ in spans)) / steps
    return sorted(busy, key=lambda row: -float(str(row["us"])))[:14] + [
        {"kernel": "from first to last", "us": round(total, 1)}
    ]


@torch.no_grad()
def steps(
    report: Report, view: View, form: Format, variants: dict[str, Any], fits: dict, context: int, rounds: int
) -> None:
    """Time variants that share weights, in turn. variants: (share dropped, early or None: Triton, tile)."""
    tag = f"{form.bits} bits, {form.layout}"
    start = time.time()
    with step_weights(view, form) as weights:
        twice = "gate_up" if "gate" in weights.blocks[0] else None  # the 16-bit rows of gate and up
        stored = [w for block in weights.blocks for name, w in block.items() if name != twice]
        sizes = [w.nbytes for w in stored]
        head_bytes = weights.head.nbytes
        cache, token = prefilled(view, context)
        capacity = cache.layers[0].max_cache_len
        layers = [0, view.n_layers - 1]
        x = torch.randn(1, 1, view.d_model, device="cuda").to(view.dtype)
        moved = (x.float() * (1 + torch.finfo(view.dtype).eps / 2 * torch.randn_like(x.float()))).to(view.dtype)
        loops: dict[str, DecodeLoop] = {}
        held: list[Any] = []
        kept_of: dict[str, float] = {}
        wants: dict[float, Any] = {}

        def prepare(name: str, sparsity: float, early: int | None, *more: Any) -> None:
            packed.default_tile = (lambda *_: Tile(*more[0])) if more else default_tile
            thresholds, kept = fits[sparsity]
            context_ = (
                triton_step(view, weights.blocks, thresholds, sparsity)
                if early is None
                else chained(view, weights, thresholds, max(capacity, 64), early)
            )
            if sparsity not in wants:
                wants[sparsity] = (
                    masked_outputs(view, layers, thresholds, x),
                    masked_outputs(view, layers, thresholds, moved),
                )
            want, near = wants[sparsity]
            with context_ as blocks:
                held.append(blocks)  # a graph reads their buffers and thresholds after the context has ended
                got = block_outputs(view, layers, x)
                wrong = max((got[i] - want[i]).norm().item() / want[i].norm().item() for i in layers)
                rounding = max((near[i] - want[i]).norm().item() / want[i].norm().item() for i in layers)
                report.facts.setdefault("block_errors", {})[f"{tag}: {name}"] = {
                    "step": wrong,
                    "one rounding": rounding,
                }
                assert wrong < max(3 * rounding, 0.02), (
                    f"{name}: blocks are off by {wrong}, one rounding does {rounding}"
                )
                loops[name] = DecodeLoop(view, cache, token)
            kept_of[name] = 1 - dropped_share(view, kept) if kept else 1.0

        for name, how in variants.items():
            report.attempt(f"{tag}: {name}", lambda: prepare(name, *how))
        packed.default_tile = default_tile
        print(f"{tag}: ready after {time.time() - start:.1f} s", flush=True)
        times: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(rounds + 1):
            for name, loop in loops.items():
                loop.rewind(context, token)
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(NEW_TOKENS):
                    loop.step()
                end.record()
                end.synchronize()
                if number:
                    times[name].append(begin.elapsed_time(end) / NEW_TOKENS)
                assert loop.logits is not None and torch.isfinite(loop.logits).all()
        cache_bytes = 2 * view.n_layers * view.n_kv_heads * view.head_dim * (context + NEW_TOKENS / 2) * 2
        for name, each in times.items():
            ms = median(each)
            report.add(
                "step", ms * 1e3, sum(sizes) * kept_of[name] + head_bytes + cache_bytes, variant=name, bits=form.bits,
                group=form.group, layout=form.layout, context=context, tokens_per_s=round(1e3 / ms, 1),
                spread=round((max(each) - min(each)) / ms, 4), kept=round(kept_of[name], 4),
            )  # fmt: skip
        report.save()
        for name in list(loops)[:4]:
            loop = loops[name]
            loop.rewind(context, token)
            key = f"{tag}: {name}"
            report.attempt(
                f"profile {key}", lambda: report.facts.setdefault("profiles", {}).update({key: kernel_times(loop)})
            )
        loops.clear()
    print(f"{tag}: {time.time() - start:.1f} s", flush=True)


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
    report = Report(args.out, args.seconds)

    def timed_steps() -> None:
        view = llama_2_7b(torch.bfloat16, args.layers)
        keep_all = {(name, layer): -1.0 for layer, block in enumerate(view.blocks) for name, _ in block.projections()}
        fits = {0.0: ({}, {}), 0.01: (keep_all, {}), 0.5: fit(view, 0.5)}

        def pair(early: int, *tile: Any) -> dict[str, Any]:
            name = f"early {early}" + (f", {tile[0]}" if tile else "")
            return {f"dense, {name}": (0.0, early, *tile), f"50 %, {name}": (0.5, early, *tile)}

        own = {"triton dense": (0.0, None), "triton 50 %": (0.5, None)}
        wide = pair(1, (32, 8, 8, 2)) | pair(2, (32, 8, 8, 2)) | pair(1, (32, 4, 8, 5)) | pair(2, (32, 4, 8, 4))
        int4 = pair(1, (32, 4, 8, 4)) | pair(1, (64, 4, 8, 4)) | pair(1, (64, 8, 8, 2)) | pair(1, (32, 16, 8, 1))
        for form, variants in (
            (Format(16), own | pair(0) | wide | {"0 % kept all, early 1": (0.01, 1)}),
            (Format(4, 128), pair(0) | pair(1) | pair(2) | int4),
            (Format(8, 128), pair(1) | pair(2) | pair(1, (32, 8, 8, 2))),
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
