"""Who else is at work while variants are timed, and how much memory each takes."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch

from harness.results.rows import GPU_NEIGHBOURS

CORES = 0.3  # that others take without a word said about it


@dataclass
class Watch:
    """Looks at others during a run, not only before it.

    others: how much others do: since its last call, or at this moment. every: seconds between two looks, since a short
    one sees little (ticks of a clock) or costs much (nvidia-smi). looks: (seconds since the look before, what was
    seen).
    """

    others: Callable[[], float]
    unit: str  # cores | processes
    every: float = 1.0
    clock: Callable[[], float] = time.perf_counter
    looks: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.last = self.clock()
        first = self.others()  # from here on
        if self.unit == "processes":
            self.looks.append((0.0, first))

    def look(self, at_once: bool = False) -> None:
        """Look if it is time to, or at once: at the end."""
        moment = self.clock()
        if at_once or moment - self.last >= self.every:
            self.looks.append((moment - self.last, self.others()))
            self.last = moment

    @property
    def mean(self) -> float:
        """Over the time that was watched."""
        seconds = sum(length for length, _ in self.looks)
        return sum(length * seen for length, seen in self.looks) / seconds if seconds else 0.0

    @property
    def most(self) -> float:
        """The most that was seen, NaN if a look failed. Cores are of looks of full length: clocks tick too coarsely."""
        least = 0.0 if self.unit == "processes" else self.every
        seen = [seen for length, seen in self.looks if length >= least]
        return math.nan if any(map(math.isnan, seen)) else max(seen, default=self.mean)

    def words(self) -> str | None:
        """Who disturbed the run, or None."""
        if math.isnan(self.most):
            return "whether others used the GPU can't be told: nvidia-smi does not run here"
        if self.unit == "processes":
            return f"{self.most:.0f} {GPU_NEIGHBOURS}" if self.most else None
        if self.mean <= CORES and self.most <= 2 * CORES:
            return None
        return f"other processes took {self.mean:.1f} cores, at most {self.most:.1f}"


def watch(device: torch.device) -> Watch:
    """A watch over this device, from now on."""
    if device.type == "cuda":
        return Watch(lambda: gpu_neighbours(device), "processes", every=5.0)
    return Watch(CpuNeighbours(), "cores")


class CpuNeighbours:
    """Cores that other processes took since the last call: the whole machine's busy time less this process's own."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.before: tuple[float, float, float] = self._counters()

    def _counters(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        # Linux counts guests' time twice, as the user's too.
        busy = times.user + times.system + sum(getattr(times, name, 0.0) for name in ("nice", "irq", "softirq"))
        own = psutil.Process().cpu_times()
        return self.clock(), busy, own.user + own.system

    def __call__(self) -> float:
        """Cores, a mean over that time."""
        after = self._counters()
        seconds, busy, own = (now - then for now, then in zip(after, self.before, strict=True))
        self.before = after
        return max(0.0, busy - own) / seconds if seconds > 0 else 0.0


def gpu_neighbours(device: torch.device) -> float:
    """Other processes that compute on the GPU at this moment, by nvidia-smi; NaN where it does not run."""
    this = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-i", this, "--query-compute-apps=pid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return math.nan
    return float(len({int(pid) for pid in listed.split() if pid.isdigit()} - {os.getpid()}))


@dataclass(frozen=True)
class Memory:
    """Memory of a run: on a GPU the peak since `reset`, on a CPU what the process holds (its peak can't be reset)."""

    metric: str
    reset: Callable[[], None]
    read: Callable[[], int]


def memory_of(device: torch.device) -> Memory:
    """How memory is counted on this device."""
    if device.type == "cuda":
        return Memory(
            "peak_memory",
            lambda: torch.cuda.reset_peak_memory_stats(device),
            lambda: torch.cuda.max_memory_allocated(device),
        )
    return Memory("resident_memory", lambda: None, lambda: psutil.Process().memory_info().rss)
