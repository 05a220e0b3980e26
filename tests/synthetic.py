"""A made-up study with known answers, for the tests of tables and figures. Nothing in it was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from harness.results.collect import dense_key, relate
from harness.results.identity import cell_id
from harness.results.rows import make_row, to_frame
from harness.results.store import Store

TASKS = ("piqa", "arc_easy", "sciq", "lambada_openai", "copa", "hellaswag")
LAYERS = 30
HARM = {"oracle": 0.25, "teal": 0.6, "random": 2.0}  # how much a method loses at equal sparsity
Cell = tuple[dict[str, Any], dict[str, Any], dict[str, list[dict[str, Any]]]]


def config(method: str, sparsity: float, **changes: Any) -> dict[str, Any]:
    base = {"model": {"name": "smollm2-135m"}, "method": {method: {}}, "sparsity": sparsity}
    return base | {"tasks": list(TASKS), "phase": "all", "seed": 0} | changes


def cells(
    methods: tuple[str, ...] = ("teal", "random", "oracle"),
    sparsities: tuple[float, ...] = (0.25, 0.4, 0.5),
    execution: str = "masked",
    limited: bool = False,
    model: str = "smollm2-135m",
    tasks: tuple[str, ...] = TASKS,
) -> Iterator[Cell]:
    """(config, identity, rows of each probe) of a dense cell and of each (method, sparsity)."""
    for method, sparsity in [("dense", 0.0), *((m, s) for m in methods for s in sparsities)]:
        identity = {
            "model": model,
            "family": "llama",
            "activation": "silu",
            "method": method,
            "sparsity_requested": sparsity,
            "scope": "model",
            "phase": "all",
            "dense_prefix": 0,
            "dtype": "float32",
            "device": "cpu",
            "seed": 0,
            "limited": limited,
        }
        probes = {
            "quality": _quality(method, sparsity, tasks),
            "sparsity": _sparsity(method, sparsity),
            "latency": _latency(method, sparsity, execution),
        }
        yield config(method, sparsity, model={"name": model}), identity, probes


def table(**changes: Any) -> pd.DataFrame:
    """The collected table of `cells(**changes)`."""
    rows, keys = [], {}
    for settings, identity, probes in cells(**changes):
        name = cell_id(settings)
        keys[name] = dense_key(settings)
        for probe, facts in probes.items():
            rows += [make_row(**(identity | {"cell_id": name, "probe": probe} | fact)) for fact in facts]
    return relate(to_frame(rows), keys)


def fill(store: Store, **changes: Any) -> None:
    """Write `cells(**changes)` as a real run would."""
    for settings, identity, probes in cells(**changes):
        with store.claim(cell_id(settings), settings, {"method": 1}, identity) as cell:
            for probe, rows in probes.items():
                cell.commit(probe, rows)
            cell.finish()


def _quality(method: str, sparsity: float, tasks: tuple[str, ...]) -> list[dict[str, Any]]:
    loss = HARM.get(method, 0.0) * sparsity**2
    dense = dict(zip(TASKS, (0.67, 0.55, 0.78, 0.33, 0.66, 0.36), strict=True))
    text = {"task": "boolq_passages", "n": 380_000, "unit": "1"}
    rows = [
        {"metric": "token_perplexity", "value": 22.8 * float(np.exp(2 * loss)), "stderr": 0.3, **text},
        {"metric": "bits_per_byte", "value": 1.04 + 0.4 * loss, "stderr": 0.01, **text},
    ]
    for task in tasks:
        accuracy = dense[task] * (1 - loss)
        scored = {"task": task, "n": 400, "unit": "share"}
        stderr = float(np.sqrt(accuracy * (1 - accuracy) / 400))
        rows.append({"metric": "acc", "value": accuracy, "stderr": stderr, **scored})
        if method != "dense":
            won = 0.3 * loss
            harm = {
                "flips_right_to_wrong": dense[task] - accuracy + won,
                "flips_wrong_to_right": won,
            }
            rows += [{"metric": metric, "value": value, **scored} for metric, value in harm.items()]
            change = {"metric": "acc_minus_dense", "value": accuracy - dense[task], "stderr": stderr / 2}
            rows.append({**change, **scored})
    if method != "dense":
        rows.append({"metric": "kl_to_dense", "value": loss, "stderr": 0.01, **text, "unit": "nats"})
        rows.append({"metric": "top1_agreement", "value": 1 - loss / 2, **text, "unit": "share"})
    return rows


def _sparsity(method: str, sparsity: float) -> list[dict[str, Any]]:
    share = {"metric": "achieved", "n": 10_000, "unit": "share", "step_phase": "all"}
    reached = 0.98 * sparsity
    mlp = reached - 0.05 * HARM.get(method, 0.0) * sparsity
    rows = [{**share, "site": "mlp", "value": mlp}, {**share, "site": "model", "value": reached}]
    for layer in range(LAYERS):
        for number, site in enumerate(("attn_in", "attn_out", "mlp_in", "mlp_hidden")):
            tilt = 0.3 * (layer / LAYERS - 0.5) * (number - 1.5)
            rows.append({**share, "site": site, "layer": layer, "value": reached * (1 + tilt)})
    return rows


def _latency(method: str, sparsity: float, execution: str) -> list[dict[str, Any]]:
    timing = {"unit": "ms", "n": 50, "batch": 1, "context": 128, "step_phase": "decode"}
    dense = [
        {"metric": "tpot_median", "value": 20.0, "stderr": 0.2, "execution": "dense", **timing},
        {"metric": "ttft_median", "value": 90.0, "stderr": 0.5, "execution": "dense", **timing},
    ]
    if method == "dense":
        return dense
    time = 20.0 * (1 - 0.7 * sparsity) if execution == "kernel" else 24.0
    return dense + [
        {"metric": "tpot_median", "value": time, "stderr": 0.2, "execution": execution, **timing},
        {"metric": "ttft_median", "value": 95.0, "stderr": 0.5, "execution": execution, **timing},
    ]
