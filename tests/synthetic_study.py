"""A made-up study of two models with every kind of row, for tests. Nothing in it was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from harness.results.collect import dense_key, relate
from harness.results.identity import cell_id
from harness.results.rows import make_row, to_frame
from harness.results.store import Store
from tests import synthetic

MODELS = {"smollm2-135m": "silu", "smollm2-135m-relu2": "relu2"}
LAYERS = 6
BATCHES = (1, 2, 4, 8)
CONTEXTS = (128, 512, 2048)
WINDOWS = 12
# Method, variant, how much it loses at equal sparsity, and the time of a kernel per share of bytes left (None: masked).
METHODS: tuple[tuple[str, str | None, float, float | None], ...] = (
    ("teal", None, 0.6, 1.1),
    ("random", None, 2.0, None),
    ("oracle", None, 0.25, None),
    ("cett", None, 0.5, 1.2),
    ("dejavu", "targets=mlp", 0.9, 1.3),
    ("dejavu", "targets=mlp,predictor=lookahead", 1.1, 1.3),
    ("dejavu", "targets=mlp,predictor=oracle", 0.3, None),
    ("kv_skip", "kv=mask_output", 0.3, None),
    ("kv_skip", "kv=recompute", 0.3, None),
    ("kv_skip", None, 0.7, None),
    ("kv_skip", "dropped=zeros", 0.9, None),
    ("griffin", None, 0.6, None),
    ("expert_prune", None, 0.6, None),
)
SPARSITIES = (0.25, 0.5, 0.75)
Cell = tuple[dict[str, Any], dict[str, Any], dict[str, list[dict[str, Any]]]]


def cells(limited: bool = False) -> Iterator[Cell]:
    """(config, identity, rows of each probe) of each cell: two dense ones, one CETT budget each, and the matrix."""
    for model, activation in MODELS.items():
        plan = [("dense", None, 0.0, None, 0.0), ("cett", "cett=0.2", 0.4, None, 0.0)]
        plan += [(*method, sparsity) for method in METHODS for sparsity in SPARSITIES]
        for method, variant, harm, speed, sparsity in plan:
            asked = None if variant == "cett=0.2" else sparsity  # an error budget settles it
            identity = {
                "model": model,
                "family": "llama",
                "activation": activation,
                "method": method,
                "variant": variant,
                "sparsity_requested": asked,
                "scope": "native",
                "phase": "all",
                "dense_prefix": 0,
                "dtype": "float32",
                "device": "made-up device",
                "seed": 0,
                "limited": limited,
                "execution": "dense" if method == "dense" else "masked",
            }
            harm = harm * (0.4 if activation == "relu2" else 1.0)
            probes = {
                "quality": _quality(method, sparsity, harm),
                "sparsity": _sparsity(method, variant, sparsity, activation),
                "latency": list(_latency(method, sparsity, speed, asked)),
            }
            if method == "expert_prune":
                probes["frequency"] = list(_experts())
            if method == "dejavu":
                probes["predictivity"] = list(_predictivity(variant or "", sparsity, activation))
            if method == "dense" or (method == "cett" and variant is None):
                probes["affinity"] = list(_affinity(sparsity, activation))
            config = synthetic.config(method, sparsity, model={"name": model})
            yield config | {"method": {"name": method, "of": variant}}, identity, probes


def table(**changes: Any) -> pd.DataFrame:
    """The collected table of `cells(**changes)`."""
    rows, keys = [], {}
    for config, identity, probes in cells(**changes):
        name = cell_id(config)
        keys[name] = dense_key(config)
        for probe, facts in probes.items():
            rows += [make_row(**(identity | {"cell_id": name, "probe": probe} | fact)) for fact in facts]
    return relate(to_frame(rows), keys)


def fill(store: Store, **changes: Any) -> None:
    """Write `cells(**changes)` as a real run would, with per-window samples of the text."""
    for config, identity, probes in cells(**changes):
        with store.claim(cell_id(config), config, {"method": 1}, identity) as cell:
            nll = next(row["value"] for row in probes["quality"] if row["metric"] == "nll")
            wave = np.sin(np.arange(WINDOWS))
            samples = pd.DataFrame({"window": range(WINDOWS), "nll": 511 * (nll + 0.1 * wave), "tokens": 511})
            for probe, rows in probes.items():
                name = "perplexity" if probe == "quality" else probe
                cell.commit(name, [{"probe": probe} | row for row in rows], samples if probe == "quality" else None)
            cell.finish()


def _quality(method: str, sparsity: float, harm: float) -> list[dict[str, Any]]:
    loss = harm * sparsity**2 if sparsity else (0.0 if method == "dense" else 0.05)
    nll = 3.1 + loss
    text = {"task": "perplexity", "n": 6132, "split": "validation"}
    rows = [
        {"metric": "token_perplexity", "value": float(np.exp(nll)), "stderr": 0.3, "unit": "ratio", **text},
        {"metric": "nll", "value": nll, "stderr": 0.01, "unit": "nats/token", **text},
    ]
    for task, accuracy in (("piqa", 0.67), ("copa", 0.66)):
        scored = {"task": task, "n": 1000, "unit": "share"}
        value = accuracy * (1 - 0.5 * min(1.0, loss))
        rows.append({"metric": "acc", "value": value, "stderr": 0.015, **scored})
        if method != "dense":
            rows.append({"metric": "acc_minus_dense", "value": value - accuracy, "stderr": 0.008, **scored})
            rows.append({"metric": "flips_right_to_wrong", "value": accuracy - value + 0.2 * loss, **scored})
            rows.append({"metric": "flips_wrong_to_right", "value": 0.2 * loss, **scored})
    if method != "dense":
        rows.append({"metric": "kl_to_dense", "value": loss, "stderr": 0.01, "unit": "nats", **text})
    if method in ("dense", "kv_skip", "griffin"):
        rows += [
            {"metric": "nll", "value": 3.1 + loss * context / 512, "unit": "nats/token", "context": context, **text}
            for context in CONTEXTS
        ]
    return rows


def _sparsity(method: str, variant: str | None, sparsity: float, activation: str) -> list[dict[str, Any]]:
    share = {"n": 10_000, "unit": "share", "step_phase": "all"}
    natural = 0.7 if activation == "relu2" else 0.0
    reached = max(sparsity, natural) if method in ("cett", "dejavu") else sparsity
    site = {"dejavu": "neurons", "kv_skip": "heads", "cett": "mlp_hidden"}.get(method, "mlp_in")
    rows = [
        {"metric": "achieved", "site": "mlp", "value": 0.0 if site == "heads" else reached * 0.8, **share},
        {"metric": "achieved", "site": "model", "value": reached * 0.5, **share},
        {"metric": "achieved", "site": site, "value": reached, **share},
    ]
    for layer in range(LAYERS):
        tilt = 1 - 0.1 * layer / LAYERS
        level = {"silu": 0.6, "relu2": 0.8}[activation] if variant == "cett=0.2" else reached
        rows.append({"metric": "zeros", "site": "mlp_hidden", "layer": layer, "value": natural * tilt, **share})
        if method == "dense":
            rows.append({"metric": "zeros", "site": "gate", "layer": layer, "value": 0.9 * natural * tilt, **share})
            rows += [
                {"metric": f"magnitude_q{q}", "site": "mlp_in", "layer": layer, "value": (1 + layer) * q**2}
                | (share | {"unit": "activation"})
                for q in (0.1, 0.3, 0.5, 0.7, 0.9)
            ]
        if method == "teal":
            threshold = {"metric": "threshold", "layer": layer, "value": sparsity * (1 + layer)} | share
            rows += [threshold | {"site": site, "unit": "activation"} for site in ("q", "up", "down")]
        if method != "dense":
            rows.append({"metric": "achieved", "site": site, "layer": layer, "value": level * tilt, **share})
    return rows


def _latency(method: str, sparsity: float, speed: float | None, asked: float | None) -> Iterator[dict[str, Any]]:
    yield {"metric": "read_bandwidth", "value": 1e10, "unit": "bytes/s", "n": 1, "execution": "dense"}
    for batch in BATCHES:
        for context in CONTEXTS:
            size = 1.4e8 + 4e3 * batch * context
            dense = 1.15 * size / 1e10
            where = {"batch": batch, "context": context, "step_phase": "decode"}
            yield from _times(dense, 0.0, dense, size, where | {"execution": "dense"})
            if method == "dense":
                continue
            left = 1 - 0.5 * sparsity
            time = 1.3 * dense if speed is None else speed * dense * (1 - (1 - left) / batch)
            execution = "masked" if speed is None else "kernel"
            yield from _times(time, asked, dense, size * left, where | {"execution": execution})


def _times(
    seconds: float, sparsity: float | None, dense: float, size: float, where: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    where = where | {"sparsity_requested": sparsity}
    yield {"metric": "tpot_median", "value": seconds, "stderr": 0.01 * seconds, "unit": "s", "n": 50, **where}
    yield {"metric": "time_ratio", "value": dense / seconds, "unit": "ratio", "n": 5, **where}
    yield {"metric": "step_bytes", "value": size, "unit": "bytes", "n": 1, **where}


def _predictivity(variant: str, sparsity: float, activation: str) -> Iterator[dict[str, Any]]:
    share = {"n": 10_000, "unit": "share", "step_phase": "all"}
    best = 0.9 if activation == "relu2" else 0.7
    level = 1.0 if "oracle" in variant else best - (0.1 if "lookahead" in variant else 0.0)
    for layer in range(LAYERS):
        recall = level - 0.02 * layer * (1 - level)
        yield {"metric": "recall", "value": recall, "site": "neurons", "layer": layer, **share}
        yield {"metric": "density", "value": 1 - sparsity, "site": "neurons", "layer": layer, **share}


def _experts() -> Iterator[dict[str, Any]]:
    share = {"metric": "expert_frequency", "n": 10_000, "unit": "share", "step_phase": "all"}
    for layer in range(LAYERS):
        for expert in range(4):
            for text, shift in (("coqa", 0), ("squad", 1)):
                used = 0.2 * ((expert + layer + shift) % 4) + 0.1
                yield {"task": text, "layer": layer, "site": f"expert:{expert}", "value": used, **share}


def _affinity(sparsity: float, activation: str) -> Iterator[dict[str, Any]]:
    share = {"n": 10_000, "unit": "share", "step_phase": "decode", "site": "neurons"}
    active = (0.3 if activation == "relu2" else 0.9) * (1 - sparsity)
    for layer in range(LAYERS):
        yield {"metric": "density", "value": active, "layer": layer, **share}
        yield {"metric": "reuse_previous", "value": active + 0.3 * (1 - active), "layer": layer, **share}
        for tokens in BATCHES:
            union = 1 - (1 - active) ** (tokens**0.8)
            yield {"metric": "union_batch", "value": union, "layer": layer, "batch": tokens, **share}
            yield {"metric": f"union_{tokens}", "value": active + 0.8 * (union - active), "layer": layer, **share}
