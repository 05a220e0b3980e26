"""Paired measurement: in each round every call takes its turn, and ratios are of times of the same round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

Measured = TypeVar("Measured")


def in_turn(calls: Mapping[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """What each call gives, by name and round. One more round comes first, to warm up."""
    found: dict[str, list[Measured]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            value = call()
            if number:
                found[name].append(value)
    return found


def sweep(call: Callable[[int], object], n: int) -> tuple[float, float]:
    """CPU and wall seconds of call(0), ..., call(n - 1)."""
    wall, cpu = time.perf_counter(), time.thread_time()
    for i in range(n):
        call(i)
    return time.thread_time() - cpu, time.perf_counter() - wall


def ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds of one time over another."""
    return round(median(a / b for a, b in zip(above, below, strict=True)), 3)
