"""What the benchmarks of attention and of a batch's step share: the record, paired rounds, memory for caches."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import kernels.cuda as kc
from bench.gpu_common import error
from bench.record import where, write

DEVICE = "cuda"
HEAD_DIM, DTYPE = 128, torch.bfloat16
TOLERANCE = 2e-2
ROUNDS = 7
Call = Callable[[], Any]


class Bench:
    """The record, written after each part, and the time that is left."""

    def __init__(self, what: str | None, out: Path, seconds: float) -> None:
        self.out, self.started, self.seconds = out, time.time(), seconds
        self.rate = kc.read_bandwidth(DEVICE, 0.2)
        self.record: dict[str, Any] = {
            "what": what,
            "environment": where(),
            "device": torch.cuda.get_device_name(),
            "read_bytes_per_s": self.rate,
            "dtype": str(DTYPE).removeprefix("torch."),
            "checks": {},
            "failed": {},
            "left_out": [],
            "rows": [],
        }

    def part(self, name: str, make: Call) -> None:
        """Run one part and write what there is; a failure is told and the next part goes on."""
        if time.time() - self.started > self.seconds:
            self.record["left_out"].append(name)
            return
        try:
            make()
        except Exception:
            self.record["failed"][name] = traceback.format_exc()[-2000:]
            print(name, self.record["failed"][name], flush=True)
        torch.cuda.empty_cache()
        self.save()

    def save(self) -> None:
        self.record["seconds"] = round(time.time() - self.started, 1)
        write(self.out, self.record)

    def check(self, name: str, got: Tensor, want: Tensor) -> None:
        """Note how far a kernel is from the definition. Raises ValueError where it is too far to be timed."""
        off = error(got, want.double())
        self.record["checks"][name] = off
        if not off <= TOLERANCE:
            raise ValueError(f"{name} differs from the definition by {off:.1e}")

    def compare(
        self, table: str, calls: dict[str, Call], floors: dict[str, float], dense: list[str], **facts: Any
    ) -> None:
        """Time calls in paired rounds; a row for each, with the ratio to every dense one and to the fastest of them.

        floors: bytes that a call must read. dense: names of the dense calls.
        """
        rounds = paired(calls)
        fastest = min(dense, key=lambda name: median(rounds[name]))
        for name, times in rounds.items():
            us, floor = median(times), floors[name] / self.rate * 1e6
            row = {"table": table, **facts, "variant": name, "us": us, "floor_us": floor, "share_of_floor": floor / us}
            row["rounds"] = [round(t, 2) for t in times]
            for other in dense:
                row[f"over {other}"] = median(theirs / t for theirs, t in zip(rounds[other], times, strict=True))
            row["over tuned dense"] = row[f"over {fastest}"]
            self.record["rows"].append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "rounds"}, flush=True)


def paired(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Microseconds a call, one value a round."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:  # compile, warm up
        calls[name]()
    torch.cuda.synchronize()
    for number in range(ROUNDS + 1):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            repeats = calls[name]() or 1
            end.record()
            end.synchronize()
            if number:
                times[name].append(start.elapsed_time(end) * 1e3 / repeats)
    return times


def captured(call: Callable[[int], Any], repeats: int) -> Call:
    """Calls 0 to `repeats` - 1 in one graph; the function that replays it returns how many."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(repeats):
            call(number)

    def replay() -> int:
        graph.replay()
        return repeats

    return replay


class Cache:
    """Memory for caches of any shape: views of one buffer of random numbers."""

    def __init__(self, size: float) -> None:
        self.buffer = torch.empty(int(size) // 2, dtype=DTYPE, device=DEVICE).normal_()

    def layers(self, batch: int, groups: int, entries: int, most: int) -> list[tuple[Tensor, Tensor]]:
        """K and V [batch, groups, entries, D] of as many layers as there is room for, at most so many."""
        n = batch * groups * entries * HEAD_DIM
        count = min(most, len(self.buffer) // (2 * n))
        flat = self.buffer[: 2 * n * count].view(count, 2, batch, groups, entries, HEAD_DIM)
        return [(pair[0], pair[1]) for pair in flat]
