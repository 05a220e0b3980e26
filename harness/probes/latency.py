"""Latency probe: time to first token and time per token of the patched Hugging Face module, beside the dense one.

Every round times every variant once, so that drift hits all of them; the first round is warm-up and dropped. Masked
execution is timed only to show what it costs: it skips no bytes, and no figure draws a speed-up from it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import StaticCache

from harness.families import View

Row = dict[str, Any]


@dataclass
class Variant:
    """One way to run the step. attach: a context in which the view's model decodes that way.

    execution: dense, masked, kernel or dense_slice.
    """

    execution: str
    attach: Callable[[], AbstractContextManager[Any]] = nullcontext
    first: list[float] = field(default_factory=list)  # seconds to the first token, one a round
    each: list[float] = field(default_factory=list)  # seconds a decode step, over all rounds
    rounds: list[float] = field(default_factory=list)  # median step of each round, in the order of the rounds


@torch.no_grad()
def measure(view: View, variants: Sequence[Variant], windows: Tensor, config: dict[str, Any]) -> list[Row]:
    """Rows over the batch x context grid. windows: int64 [n, length], real text that prompts are cut from."""
    rows: list[Row] = []
    for batch in config["batch"]:
        for context in config["context"]:
            prompt = prompts(windows, batch, context).to(view.device)
            for variant in variants:
                variant.first, variant.each, variant.rounds = [], [], []
            load = other_load()
            interleave(view, variants, prompt, config["new_tokens"], config["repeats"], config["min_seconds"])
            for variant in variants:
                rows += rows_of(variant, variants[0], batch, context, load)
    return rows


def prompts(windows: Tensor, batch: int, context: int) -> Tensor:
    """int64 [batch, context] cut from running text; each row another place of it."""
    stream = windows.flatten()
    starts = [row * max(1, (len(stream) - context) // max(1, batch)) for row in range(batch)]
    repeats = -(-context // len(stream))
    stream = stream.repeat(repeats + 1) if repeats > 1 else stream
    return torch.stack([stream[start : start + context] for start in starts])


def interleave(
    view: View, variants: Sequence[Variant], prompt: Tensor, new_tokens: int, repeats: int, min_seconds: float
) -> None:
    """Round after round until every variant has `repeats` rounds and `min_seconds` of decode time."""
    done, spent = -1, 0.0  # the first round is warm-up
    collecting, _ = gc.isenabled(), gc.disable()
    try:
        while done < repeats or spent / len(variants) < min_seconds:
            for variant in variants:
                with variant.attach():
                    first, steps = generate(view, prompt, new_tokens)
                if done >= 0:
                    variant.first.append(first)
                    variant.each += steps
                    variant.rounds.append(statistics.median(steps))
                    spent += sum(steps)
            done += 1
    finally:
        if collecting:
            gc.enable()


def generate(view: View, prompt: Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Greedy decode with a static cache: seconds to the first token, and of each of the new_tokens - 1 steps after it."""
    batch, context = prompt.shape
    cache = StaticCache(config=view.model.config, max_cache_len=context + new_tokens)
    start = now(prompt.device)
    token = view.model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    last = now(prompt.device)
    first, steps = last - start, []
    for _ in range(new_tokens - 1):
        token = view.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        moment = now(prompt.device)
        steps.append(moment - last)
        last = moment
    return first, steps


def now(device: torch.device) -> float:
    """Seconds, with the device's queue empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def other_load() -> float:
    """CPU share that other processes take at the moment, in cores."""
    own = psutil.Process()
    before, start = sum(own.cpu_times()[:2]), time.perf_counter()
    total = psutil.cpu_percent(interval=0.2) / 100 * (psutil.cpu_count() or 1)
    mine = (sum(own.cpu_times()[:2]) - before) / (time.perf_counter() - start)
    return max(0.0, total - mine)


def rows_of(variant: Variant, baseline: Variant, batch: int, context: int, load: float) -> list[Row]:
    """Medians, the 90th percentile, spread, tokens/s and the paired ratio to the baseline, one fact a row."""
    common: Row = {"probe": "latency", "execution": variant.execution, "batch": batch, "context": context}
    common |= {"step_phase": "decode"}
    if load > 0.3:
        common["message"] = f"other processes took {load:.1f} cores"
    median = statistics.median(variant.each)
    p90 = sorted(variant.each)[int(0.9 * (len(variant.each) - 1))]
    paired = [theirs / ours for theirs, ours in zip(baseline.rounds, variant.rounds, strict=True)]
    spread = statistics.stdev(variant.rounds) if len(variant.rounds) > 1 else None
    n = len(variant.each)
    first = {"metric": "ttft_median", "value": statistics.median(variant.first), "unit": "s", "n": len(variant.first)}
    return [
        common | first | {"step_phase": "prefill"},
        common | {"metric": "tpot_median", "value": median, "unit": "s", "n": n, "stderr": spread},
        common | {"metric": "tpot_p90", "value": p90, "unit": "s", "n": n},
        common | {"metric": "tokens_per_second", "value": batch / median, "unit": "tokens/s", "n": n},
        common | {"metric": "time_ratio", "value": statistics.median(paired), "unit": "ratio", "n": len(paired)},
    ]
