"""Joules of decode steps, where the device counts them: GPUs by NVML, CPUs by RAPL. All of the device, idle or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from harness.probes.latency.variants import Row

POWERCAP = Path("/sys/class/powercap")
LEAST = 5  # renewals of the counter that a run must last, or what came before it is counted too


@dataclass(frozen=True)
class Meter:
    """A counter of joules. read: joules so far; what: is counted, in words; every: seconds between its renewals."""

    read: Callable[[], float]
    what: str
    every: float


def meter_of(devices: Iterable[torch.device]) -> Meter | None:
    """The counter of these devices, or None where they have none that this user may read."""
    own = sorted(set(devices), key=str)
    return gpu_meter(own) if own[0].type == "cuda" else cpu_meter()


def gpu_meter(devices: list[torch.device]) -> Meter | None:
    """NVML's count since the driver was loaded, summed over GPUs."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        ids = [f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in devices]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(one) for one in ids]

        def read() -> float:
            return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in handles) / 1e3

        read()
    except pynvml.NVMLError:  # no driver, a part of a GPU, or an older GPU
        return None
    return Meter(read, "the whole GPU by NVML" if len(devices) == 1 else f"{len(devices)} GPUs by NVML", 0.1)


def cpu_meter(root: Path = POWERCAP) -> Meter | None:
    """RAPL's count of all processor packages and of the memory where that is apart."""
    try:
        domains = [Domain(folder) for folder in sorted(root.glob("intel-rapl:*")) if _counted(folder)]
    except (OSError, ValueError):  # most kernels let only root read it
        return None
    if not domains:
        return None
    memory = " and memory" if any(domain.name == "dram" for domain in domains) else ""
    return Meter(lambda: sum(domain.read() for domain in domains), f"the whole processor{memory} by RAPL", 0.001)


def _counted(folder: Path) -> bool:
    return (folder / "name").read_text().startswith(("package", "dram"))


class Domain:
    """One counter of RAPL, which begins anew when it is full."""

    def __init__(self, folder: Path) -> None:
        self.name = (folder / "name").read_text().strip()
        self.counter, self.full = folder / "energy_uj", int((folder / "max_energy_range_uj").read_text())
        self.last, self.sum = int(self.counter.read_text()), 0

    def read(self) -> float:
        """Joules since it was first read."""
        value = int(self.counter.read_text())
        self.sum += value - self.last + (self.full if value < self.last else 0)
        self.last = value
        return self.sum / 1e6


def energy_row(meter: Meter | None, joules: list[float], steps: list[float], batch: int, rounds: int) -> Row | None:
    """Joules a token, or None where nothing counts them or rounds are too short for the counter.

    joules: of each round's decode steps; steps: seconds of each step of all rounds.
    """
    if meter is None or not joules or sum(steps) / rounds < LEAST * meter.every:
        return None
    tokens = batch * len(steps)
    return {"metric": "energy_per_token", "value": sum(joules) / tokens, "unit": "J/token", "n": tokens}
