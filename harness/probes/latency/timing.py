"""Rounds, and the clock."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import StaticCache

from harness.execution.decode_loop import DecodeLoop
from harness.model.view import View
from harness.probes.latency.energy import Meter
from harness.probes.latency.variants import Variant
from harness.probes.latency.watch import Memory
from harness.progress import counting


@dataclass(frozen=True)
class Sample:
    """One run of a variant. first: seconds to the first token. steps: of each decode step. memory: bytes.

    joules: of the decode steps, where they are counted.
    """

    first: float
    steps: Sequence[float]
    memory: int = 0
    joules: float | None = None


@dataclass
class Timing:
    """The rounds of one variant.

    first: seconds to the first token, one a round. each: seconds a decode step, over all rounds. rounds: the median
    step of each round, in the order of the rounds. memory: the largest of a round, bytes. joules: of a round's decode
    steps, where they are counted.
    """

    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    memory: int = 0
    joules: list[float] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Take in a round."""
        self.first.append(sample.first)
        self.each += sample.steps
        self.rounds.append(statistics.median(sample.steps))
        self.memory = max(self.memory, sample.memory)
        self.joules += [] if sample.joules is None else [sample.joules]

    @property
    def median(self) -> float:
        """Seconds a decode step."""
        return statistics.median(self.each)


def ratio(baseline: Timing, timing: Timing) -> float:
    """Median over rounds of baseline time over time, paired by round: above 1 is faster."""
    return statistics.median(theirs / ours for theirs, ours in zip(baseline.rounds, timing.rounds, strict=True))


def interleave(
    runs: Sequence[Callable[[], Sample]],
    repeats: int,
    min_seconds: float,
    after_round: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Round after round until every run has `repeats` rounds and, on average, `min_seconds` of decode time.

    Each round begins one run later than the round before: what a run leaves behind (a warm cache, a hot chip) meets
    another successor. The first round is warm-up and dropped.
    """
    timings = [Timing() for _ in runs]
    number, spent = 0, 0.0
    with no_garbage_collection(), counting(repeats + 1, "timing, rounds", still=True) as bar:
        while number <= repeats or spent / len(runs) < min_seconds:
            for place in range(len(runs)):
                at = (place + number) % len(runs)
                sample = runs[at]()
                if number:
                    timings[at].add(sample)
                    spent += sum(sample.steps)
            if number:
                after_round()
            number += 1
            if spent:
                bar.at(number, max(repeats + 1, math.ceil((number - 1) * min_seconds * len(runs) / spent) + 1))
    return timings


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection would hit one variant and not the others."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def run(
    view: View, prompt: Tensor, new_tokens: int, variant: Variant, memory: Memory, meter: Meter | None = None
) -> Sample:
    """Attach a variant and decode once. Its peak memory is its own: the count starts when it is attached."""
    with variant.attached(len(prompt)):
        memory.reset()
        return replace(generate(view, prompt, new_tokens, variant, meter), memory=memory.read())


@torch.no_grad()
def generate(view: View, prompt: Tensor, new_tokens: int, variant: Variant, meter: Meter | None = None) -> Sample:
    """Greedy decode with a static cache: the time to the first token, and of each of the new_tokens - 1 steps after."""
    model = variant.decoder or view.model
    step = variant.step or model
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
    start = now(prompt.device)
    token = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    last = now(prompt.device)
    first, steps = last - start, []
    loop = DecodeLoop(view, cache, token) if variant.captured else None  # captured outside of the timed steps
    before = 0.0 if meter is None else meter.read()
    last = now(prompt.device)
    for _ in range(new_tokens - 1):
        if loop is not None:
            loop.step()
        else:
            out = step(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        moment = now(prompt.device)
        steps.append(moment - last)
        last = moment
    return Sample(first, steps, joules=None if meter is None else meter.read() - before)


def compile_steps(view: View, timed: Sequence[Variant], prompt: Tensor, new_tokens: int) -> None:
    """Compile the steps of the variants that want it for the shapes of one grid point, 60 to 100 s each."""
    own = [variant for variant in timed if variant.decoder is not None]
    if own:
        torch.compiler.reset()  # of all shapes of all variants together, torch would keep eight
    for variant in own:
        assert variant.decoder is not None
        variant.step = torch.compile(variant.decoder.forward, dynamic=False, fullgraph=True)
        generate(view, prompt, new_tokens, variant)


def prompts(windows: Tensor, batch: int, context: int) -> Tensor:
    """int64 [batch, context] cut from running text; each row another place of it."""
    stream = windows.flatten()
    starts = [row * max(1, (len(stream) - context) // max(1, batch)) for row in range(batch)]
    repeats = -(-context // len(stream))
    stream = stream.repeat(repeats + 1) if repeats > 1 else stream
    return torch.stack([stream[start : start + context] for start in starts])


def now(device: torch.device) -> float:
    """Seconds, with the device's queue empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
