"""Keys that a command line names and no config has: one sentence each, in place of what Hydra would say or let pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from harness.errors import ConfigError
from harness.values import did_you_mean

# What a user may add below a node: options of a method of one's own, sbatch's options, shots by task, ...
FREE = ("method", "engine.sbatch", "tasks.num_fewshot", "model.shape", "grid", "hydra")
OF_SOME_MODELS = ("adapter", "seed", "embedded", "accept_license", "weight_format", "weight_group", "device_map")


def check_keys(cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """Raise `ConfigError` for the first override whose key the composed config does not have and nobody reads."""
    for override in overrides:
        path = override.key_or_group
        added = override.is_add() or override.is_force_add()
        if not (added and any(path == free or path.startswith(f"{free}.") for free in FREE)):
            _check(cfg, path.partition("[")[0].split("."), added)


def _check(cfg: DictConfig, path: list[str], added: bool) -> None:
    node: Any = cfg
    for depth, key in enumerate(path):
        held = node._content if isinstance(node, DictConfig) else None
        if not isinstance(held, dict):
            return  # a value, or what another key says: Hydra knows
        if key not in held:
            if added and path[:depth] == ["model"] and key in OF_SOME_MODELS:
                return
            raise ConfigError(_sentence(path[:depth], key, [str(name) for name in held]))
        node = held[key]


def _sentence(above: list[str], key: str, known: list[str]) -> str:
    near = did_you_mean(key, known)
    if not above:
        return f"{key} is no key{near}: `python run.py --help` lists them"
    if above == ["method"]:
        return f"method {key} is not run here: name it, method={key} or method=[{','.join([*known, key])}]"
    if above[0] == "method":
        return f"method {above[1]} has no option {key!r}{near}: it has {', '.join(n for n in known if n != '_target_')}"
    if above == ["model"] and key in OF_SOME_MODELS:
        return f"this model has no key {key}: add it as +model.{key}="
    return f"{'.'.join([*above, key])} is no key{near}: {'.'.join(above)} has {', '.join(known)}"
