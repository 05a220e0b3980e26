"""What makes two cells one: the keys that are no part of it, the digest of the others, the id. Light: no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

# Top-level keys of the config that say where or how cells are run and logged, not what is measured.
RUN_KEYS = frozenset(
    {
        "results",
        "logger",
        "dry",
        "plan",
        "retry",
        "retry_failed",
        "force",
        "on_error",
        "cells",
        "workers",
        "engine",
        "archived",
        "sweeps",
        "experiment",
        "grid",
        "device_index",
        "hydra",
    }
)
# A path whose content has a hash beside it: where it lies makes no difference.
HASHED_PATHS = (
    ("model", "fingerprint"),
    ("calibration", "sha256"),
    ("probe.perplexity", "sha256"),
    ("tasks", "sha256"),
)
PATHS = ("path", "include_path", "adapter_path")


def measured(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a cell's config that its numbers depend on."""
    found = {str(key): value for key, value in config.items() if key not in RUN_KEYS}
    for place, digest in HASHED_PATHS:
        found = _without_path(found, place, digest)
    return found


def _without_path(config: dict[str, Any], place: str, digest: str) -> dict[str, Any]:
    head, _, rest = place.partition(".")
    part = config.get(head)
    if not isinstance(part, Mapping):
        return config
    if rest:
        return config | {head: _without_path(dict(part), rest, digest)}
    return (
        config | {head: {key: value for key, value in part.items() if key not in PATHS}} if digest in part else config
    )


def cell_id(config: Mapping[str, Any], asked: str | None = None) -> str:
    """Return `<model>_<method>_<asked>_<hash>`; equal for configs that measure the same thing.

    `config` is a resolved config of plain types. The hash covers all of it that `measured` keeps. Key order, tuples or
    lists, and 0 or 0.0 make no difference. asked: what was requested, in words; None: "s" and the sparsity.
    """
    if asked is None:
        asked = "" if config.get("sparsity") is None else f"s{_plain(config['sparsity'])}"
    parts = [_name(config.get("model")), _name(config.get("method")), asked]
    slug = "_".join(re.sub(r"[^A-Za-z0-9.+-]+", "-", part).strip("-.") for part in parts if part)
    return f"{slug[:80]}_{content_key(measured(config))[:10]}"


def content_key(facts: Any) -> str:
    """Return the hex digest (32 characters) of plain data."""
    text = json.dumps(_plain(facts), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _name(part: Any) -> str:
    if isinstance(part, Mapping):
        own = part.get("name") or str(part.get("_target_", "")).rpartition(".")[2].lower()
        return str(own or "+".join(part))  # nested methods are a mapping from name to options
    return "" if part is None else str(part)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
