"""What a benchmark on a GPU knows so far, kept on disk while it runs."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kernels.cuda as kc
from bench.record import where, write


class Report:
    """What is known so far, written after every addition."""

    def __init__(self, out: Path, seconds: float, what: str) -> None:
        """seconds: after which nothing more is begun. what: the bench's own words."""
        self.out, self.started, self.seconds = out, time.time(), seconds
        self.what = what
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
        record = {
            "what": self.what,
            "environment": where(),
            "device": torch.cuda.get_device_name(),
            "read_bytes_per_s": self.rate,
            "seconds": round(time.time() - self.started, 1),
            **self.facts,
            "failed": self.failed,
            "rows": self.rows,
        }
        write(self.out, record)
