"""The probes that there are, and what each says of a cell before a model is loaded.

A probe is a file (or folder) of harness/probes with a YAML of its own name in conf/probe; nothing else lists it. Its
module has `run(bench)`, and where it has something to say:

    TIMED             True if its numbers are times: its cells run alone, on a processor that is a part of their id.
    SHAPES            True if it means something for random weights.
    check(config, methods)   raises `ConfigError` where its settings, or these methods, make no sense.
    canonical(settings)      its own settings written one way, without those that nothing reads: a part of the id.
    windows(probe)           how many windows of held-out text it will ask for; probe: all settings of probes.
    texts(probe)             [(name, tokens, window)] of the texts to learn from that it will ask for.

Its own settings lie in `probe.<its name>` and are no part of the ids of other cells.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import harness.probes
from harness.errors import ConfigError
from harness.places import CONF

if TYPE_CHECKING:
    from harness.execution.method import Method

SHARED = ("sparsity", "latency")  # settings that have been a part of every id since the first cells


def names() -> list[str]:
    """Every probe."""
    return list(_names(CONF, tuple(harness.probes.__path__)))


@lru_cache(maxsize=16)  # asked several times a cell
def _names(conf: Path, rooms: tuple[str, ...]) -> list[str]:
    room = Path(rooms[0])
    yamls = sorted(path.stem for path in (conf / "probe").glob("*.yaml"))
    return [name for name in yamls if (room / f"{name}.py").exists() or (room / name / "__init__.py").exists()]


def module(name: str) -> ModuleType:
    """A probe's module."""
    return importlib.import_module(f"harness.probes.{name}")


def timed(probe: Mapping[str, Any]) -> bool:
    """Whether any probe that is asked for measures times."""
    return any(getattr(module(name), "TIMED", False) for name in probe["names"])


def needs_weights(probe: Mapping[str, Any]) -> list[str]:
    """Of the probes that are asked for, those that mean nothing for random weights."""
    return [name for name in probe["names"] if not getattr(module(name), "SHAPES", False)]


def check(config: Mapping[str, Any], methods: Sequence[Method]) -> None:
    """Let every probe that is asked for look at its settings and the methods."""
    for name in config["probe"]["names"]:
        if hasattr(module(name), "check"):
            if name not in config["probe"]:
                raise ConfigError(f"the settings of probe {name} are in conf/probe/{name}.yaml: choose probe={name}")
            module(name).check(config, methods)


def canonical(probe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of probes without those of probes that are not run, or that nothing reads."""
    unread = [name for name in names() if name not in SHARED and name not in probe["names"]]
    found = {key: value for key, value in probe.items() if key not in unread}
    for name in probe["names"]:
        if name in found and hasattr(module(name), "canonical"):
            found[name] = module(name).canonical(found[name])
    return found


def windows(probe: Mapping[str, Any]) -> int:
    """The most windows of held-out text that any probe will ask for."""
    return max((module(name).windows(probe) for name in probe["names"] if hasattr(module(name), "windows")), default=0)


def texts(probe: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(name, tokens, window) of all texts to learn from that probes will ask for."""
    return [text for name in probe["names"] if hasattr(module(name), "texts") for text in module(name).texts(probe)]
