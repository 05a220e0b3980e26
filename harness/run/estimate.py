"""How long what is planned will take, by how long cells like it took in the same results folder."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from harness.results.identity import content_key, measured

if TYPE_CHECKING:
    from harness.results.store import Store
    from harness.run.config import CellConfig

UNTIMED = ("sparsity", "seed", "calibration")  # keys that hardly change how long a cell takes


def alike(cell: CellConfig) -> list[str]:
    """Keys that cells of much the same work share, the closest first: with the method, then with any but dense."""
    facts = {key: value for key, value in measured(cell.plain).items() if key not in (*UNTIMED, "method")}
    options = {
        name: {key: value for key, value in given.items() if key != "sparsity"}
        for name, given in cell["method"].items()
    }
    kind = "dense" if cell.method_name == "dense" else "sparse"
    return [content_key(facts | {"method": options}), content_key(facts | {"kind": kind})]


def seconds(cells: Mapping[str, CellConfig], store: Store) -> dict[str, float | None]:
    """By id, the median time of finished cells alike; None where there is none."""
    times: dict[str, list[float]] = {}
    for name in store.cells():
        status = store.view(name).status
        if status.get("status") == "done" and isinstance(status.get("seconds"), int | float):
            for key in status.get("alike", ()):
                times.setdefault(key, []).append(status["seconds"])
    return {name: _median(times.get(key) for key in alike(cell)) for name, cell in cells.items()}


def _median(found: Iterable[list[float] | None]) -> float | None:
    times = next((times for times in found if times), None)
    return None if times is None else statistics.median(times)
