"""The decode step of bench.gpu_lowbit: variants that share a weight layout, timed in turn."""

# ruff: noqa: B023  (every lambda here runs before its loop goes on)
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.gpu_decode import NEW_TOKENS, block_outputs, dropped_share, masked_outputs, moved, prefilled, token_ms
from bench.gpu_report import Report
from bench.rounds import in_turn
from harness.execution.chained_step import Format, chained, step_weights
from harness.execution.decode_loop import DecodeLoop
from harness.execution.fused_step import (
    Buffers,
    FusedBlock,
    _block_forward,
    _forward,
    _head_forward,
    _norm_forward,
    decode_attention,
)
from harness.model.view import View
from kernels.cuda import packed
from kernels.cuda.packed import Tile, default_tile


@contextmanager
def triton_step(view: View, weights: list[Any], thresholds: dict, sparsity: float) -> Iterator[list[Any]]:
    """The fused step of eight launches a block on the same W^T as the chained one."""
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
    """Time variants that share weights, in turn. variants: (share dropped, early or None: Triton, tile, cut)."""
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
        nearby = moved(x)
        loops: dict[str, DecodeLoop] = {}
        held: list[Any] = []
        kept_of: dict[str, float] = {}
        wants: dict[float, Any] = {}

        def prepare(name: str, sparsity: float, early: int | None, *more: Any) -> None:
            packed.default_tile = (lambda *_: Tile(*more[0])) if more and more[0] else default_tile
            thresholds, kept = fits[sparsity]
            context_ = (
                triton_step(view, weights.blocks, thresholds, sparsity)
                if early is None
                else chained(view, weights, thresholds, max(capacity, 64), early, more[1] if len(more) > 1 else None)
            )
            if sparsity not in wants:
                wants[sparsity] = (
                    masked_outputs(view, layers, thresholds, x),
                    masked_outputs(view, layers, thresholds, nearby),
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
        times = in_turn({name: partial(token_ms, loop, context, token) for name, loop in loops.items()}, rounds)
        for loop in loops.values():
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
