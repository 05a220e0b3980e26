"""What was timed, as rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernels
from harness.model.view import View
from harness.probes.latency.energy import Meter, energy_row, meter_of
from harness.probes.latency.reads import cache_bytes, step_bytes
from harness.probes.latency.timing import Sample, Timing, compile_steps, interleave, prompts, ratio, run
from harness.probes.latency.variants import Row, Variant
from harness.probes.latency.watch import Watch, memory_of, watch

# Engines that the library has no step in, and the one of its step that stands beside theirs.
LIBRARY = {"fused": "eager", "chained": "graph"}


@dataclass(frozen=True)
class Point:
    """One point of the batch x context grid, timed.

    timings: of every variant, in their order. disturbed: who else was at work meanwhile, in words. bandwidth: bytes/s
    read by this device in the same run. memory: the metric that memory goes by. meter: what counts joules, if anything.
    """

    batch: int
    context: int
    variants: Sequence[Variant]
    timings: Sequence[Timing]
    disturbed: str | None
    bandwidth: float
    memory: str
    meter: Meter | None = None

    def fastest(self, allowed: Callable[[Variant], bool]) -> Timing:
        """The fastest dense run among the allowed ones."""
        pairs = zip(self.variants, self.timings, strict=True)
        return min((t for v, t in pairs if v.dense and allowed(v)), key=lambda timing: timing.median)

    def first(self, engine: str) -> Timing | None:
        """The library's dense run by an engine, which comes before the tuned ones; none of quantised weights."""
        pairs = zip(self.variants, self.timings, strict=True)
        return next((t for v, t in pairs if v.dense and v.engine == engine), None)


@torch.no_grad()
def measure(view: View, variants: Sequence[Variant], windows: Tensor, config: Mapping[str, Any]) -> list[Row]:
    """Rows over the batch x context grid. windows: int64 [n, length], real text that prompts are cut from."""
    rows: list[Row] = []
    bandwidth = kernels.read_bandwidth(view.device)
    meter = meter_of(p.device for p in view.model.parameters())
    for batch in config["batch"]:
        for context in config["context"]:
            prompt = prompts(windows, batch, context).to(view.device)
            timed = [variant for variant in variants if not variant.single or batch == 1]
            timings, others, memory = timed_rounds(view, timed, prompt, config, meter)
            point = Point(batch, context, timed, timings, others.words(), bandwidth, memory, meter)
            rows += disturbance_rows(point, others)
            for variant, timing in zip(timed, timings, strict=True):
                union = variant.union(prompt) if variant.union is not None and batch <= kernels.MAX_ROWS else None
                rows += rows_of(view, point, variant, timing, union)
    fact = {"metric": "read_bandwidth", "value": bandwidth, "unit": "bytes/s", "n": 1}
    return [*rows, {"probe": "latency", "execution": "dense"} | fact]


def timed_rounds(
    view: View, timed: Sequence[Variant], prompt: Tensor, config: Mapping[str, Any], meter: Meter | None = None
) -> tuple[list[Timing], Watch, str]:
    """Time variants on a prompt [batch, context]; also who else was at work, and the metric that memory goes by."""
    compile_steps(view, timed, prompt, config["new_tokens"])
    memory = memory_of(view.device)
    runs: list[Callable[[], Sample]] = [
        partial(run, view, prompt, config["new_tokens"], variant, memory, meter) for variant in timed
    ]
    others = watch(view.device)
    timings = interleave(runs, config["repeats"], config["min_seconds"], others.look)
    others.look(at_once=True)
    return timings, others, memory.metric


def rows_of(view: View, point: Point, variant: Variant, timing: Timing, union: tuple[float, int] | None) -> list[Row]:
    """Medians, the 90th percentile, spread, throughput, roofline and paired ratios to baselines, a fact a row.

    union: of `Variant.union`.
    """
    common, reads, cache = described(point, variant, union)
    median = timing.median
    p90 = sorted(timing.each)[int(0.9 * (len(timing.each) - 1))]
    n, rounds = len(timing.each), len(timing.rounds)
    spread = statistics.stdev(timing.rounds) if rounds > 1 else None
    needed = step_bytes(view, reads, point.batch, point.context, cache, variant.block_bytes)
    facts: list[tuple[str, float, str, int]] = [
        ("tpot_p90", p90, "s", n),
        ("tokens_per_second", point.batch / median, "tokens/s", n),
        ("step_bytes", needed, "bytes", 1),
        ("kv_bytes", cache * cache_bytes(view, point.context), "bytes/token", 1),
        ("kv_bytes_dense", float(cache_bytes(view, point.context)), "bytes/token", 1),
        ("achieved_bandwidth", needed / median, "bytes/s", n),
        ("roofline_share", needed / median / point.bandwidth, "share", n),
        (point.memory, float(timing.memory), "bytes", rounds),
    ]
    if union is not None:
        facts.insert(0, ("union_touched", union[0], "share", union[1]))
    facts += [(metric, ratio(base, timing), "ratio", rounds) for metric, base in baselines(point, variant).items()]
    each = {"metric": "tpot_median", "value": median, "unit": "s", "n": n, "stderr": spread}
    rest = [common | {"metric": m, "value": v, "unit": u, "n": k} for m, v, u, k in facts]
    energy = energy_row(point.meter, timing.joules, timing.each, point.batch, rounds)
    if energy is not None and point.meter is not None:
        rest.append(common | energy | {"message": _joined(common["message"], f"counted: {point.meter.what}")})
    if variant.decoder is not None:  # its prompt is eager and dense: nothing to report
        return [common | each, *rest]
    first = {"metric": "ttft_median", "value": statistics.median(timing.first), "unit": "s", "n": rounds}
    first |= {"step_phase": "prefill", "message": _joined(common["message"], prompt_note(variant))}
    return [common | first, common | each, *rest]


def prompt_note(variant: Variant) -> str | None:
    """How the prompt ran. Kernels skip nothing of it: of its many tokens some one needs each channel."""
    if variant.masks_prompt:
        return "prompt masked, every byte read"
    return "prompt dense" if variant.execution in ("kernel", "dense_slice") else None


def _joined(*notes: str | None) -> str | None:
    return "; ".join(note for note in notes if note) or None


def described(point: Point, variant: Variant, union: tuple[float, int] | None) -> tuple[Row, float, float]:
    """The columns that all rows of a variant share, and the shares of block weights and of the cache that it reads.

    Above batch 1 what has no kernel for it is masked, reads everything, and says so.
    """
    common: Row = {"probe": "latency", "execution": variant.execution, "engine": variant.engine}
    common |= {"batch": point.batch, "context": point.context, "step_phase": "decode"} | variant.columns
    notes = [variant.columns.get("message"), point.disturbed]
    reads, cache = variant.reads, variant.reads_cache
    if point.batch > 1 and variant.execution in ("kernel", "dense_slice"):
        reads = 1.0 if union is None else union[0]
        too_many = f"no kernel above batch {variant.most}" if point.batch > variant.most else None
        no_batch = variant.no_batch or too_many
        if no_batch is not None:
            cache, common["execution"] = 1.0, "masked"
            notes.append(f"{no_batch}: masked, the library's matmul on the transposed weight")
    common["message"] = _joined(*notes)
    return common, reads, cache


def baselines(point: Point, variant: Variant) -> dict[str, Timing]:
    """The dense runs that a variant is compared with, by metric.

    The strongest dense run is the baseline of all, so that neither a better GEMV nor an engine is sold as sparsity. But
    whether a step is compiled is the user's choice, cell by cell: compiled is compared with compiled only.
    """
    compiled = variant.engine == "compiled"
    compared: dict[str, Timing | None] = {
        "time_ratio": point.fastest(lambda dense: (dense.engine == "compiled") == compiled),
        "time_ratio_engine": point.fastest(lambda dense: dense.engine == variant.engine),
        "time_ratio_library": point.first(LIBRARY.get(variant.engine, variant.engine)),
    }
    compared |= {"time_ratio_eager": point.first("eager")} if compiled else {}
    return {metric: timing for metric, timing in compared.items() if timing is not None}


def disturbance_rows(point: Point, others: Watch) -> list[Row]:
    """What other processes took while a grid point was timed: mean cores, or most processes on the GPU, if known."""
    value = others.most if others.unit == "processes" else others.mean
    row = {"probe": "latency", "execution": "dense", "batch": point.batch, "context": point.context}
    row |= {"step_phase": "decode", "message": point.disturbed}
    row |= {"metric": "disturbance", "value": value, "unit": others.unit, "n": len(others.looks)}
    return [] if math.isnan(value) else [row]
