"""What the GPU benchmarks share: how a kernel is timed, on which shapes, with which inputs."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import kernels.cuda as kc
from bench.record import where, write

SHAPES = [(12288, 4096), (4096, 4096), (11008, 4096), (22016, 4096), (4096, 11008)]  # (outputs N, inputs K)
ZEROS = (0, 25, 40, 50, 65, 80, 90)
POOL_BYTES = 2 * 10**9
HIDDEN, NEURONS = 4096, 11008


def timed(calls: list[Callable[[], Any]], replays: int = 7) -> float:
    """Microseconds a call: median replay of one graph of all the calls, often enough that its start does not count."""
    calls = calls * max(1, 100 // len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for i in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i:
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return median(times)


def error(y: Tensor, want: Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


class Bench:
    """Rows so far, written after every addition so that a run that is cut off loses nothing."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rate = kc.read_bandwidth("cuda", 0.3)
        self.rows: list[dict[str, Any]] = []
        self.started = time.time()

    def add(self, table: str, us: float, floor_bytes: float, **facts: Any) -> dict[str, Any]:
        floor = floor_bytes / self.rate * 1e6
        row = {
            "table": table,
            **facts,
            "us": us,
            "floor_us": floor,
            "added_us": us - floor,
            "share_of_floor": floor / us,
        }
        self.rows.append(row)
        return row

    def save(self) -> None:
        record = {
            "what": __doc__,
            "environment": where(),
            "device": torch.cuda.get_device_name(),
            "read_bytes_per_s": self.rate,
            "seconds": round(time.time() - self.started, 1),
            "rows": self.rows,
        }
        write(self.out, record)


class Columns:
    """Rotating copies of one shape: weights (one pool, read as W^T or as row-major W), inputs and thresholds."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, limit: int = 10**9) -> None:
        self.n, self.k, self.dtype = n, k, dtype
        self.copies = min(limit, max(4, POOL_BYTES // (n * k * 2)))
        self.pool = torch.empty(self.copies, k, n, dtype=dtype, device="cuda").normal_(0, k**-0.5)
        self.x = torch.randn(self.copies, k, device="cuda").to(dtype)
        self.y = torch.zeros(self.copies, n, device="cuda")

    def at(self, zeros: int) -> tuple[Tensor, float]:
        """Thresholds [copies, 1] that drop `zeros` percent of every input, and the mean share that is kept."""
        if zeros == 0:
            return torch.full((self.copies, 1), -1.0, device="cuda"), 1.0
        magnitude = self.x.float().abs()
        t = magnitude.quantile(zeros / 100, dim=1, keepdim=True)
        return t, (magnitude > t).float().mean().item()

    def want(self, t: Tensor) -> Tensor:
        return torch.where(self.x[0].float().abs() <= t[0], 0, self.x[0]).double() @ self.pool[0].double()
