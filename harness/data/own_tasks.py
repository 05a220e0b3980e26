"""The user's own lm-eval tasks: YAML files of a folder, with lm-eval's `include`, read as text. Light: no lm-eval.

The data source of a cell carries the folder: "local" or "hub", and behind a colon where the own tasks lie.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from harness.errors import ConfigError


class _Text(yaml.SafeLoader):
    """YAML in which lm-eval's `!function` stands for its text."""


_Text.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {getattr(node, 'value', '')}")


def source_of(config: Any) -> str:
    """The data source of a cell's config, which gives its values by key."""
    folder = config["tasks"].get("include_path")
    return config["data"]["source"] + (f":{Path(folder).resolve()}" if folder else "")


def parted(source: str) -> tuple[str, str | None]:
    """(local or hub, the folder of own tasks or None) of a data source."""
    kind, colon, folder = source.partition(":")
    return kind, folder if colon else None


def own_task(name: str, source: str) -> dict[str, Any] | None:
    """The config of an own task by its name, None where it is none."""
    folder = parted(source)[1]
    return None if folder is None else own_tasks(folder).get(name)


@cache
def own_tasks(folder: str) -> dict[str, dict[str, Any]]:
    """Task name -> its config with what it includes. Raises ConfigError for an unreadable file or a repeated name."""
    if not Path(folder).is_dir():
        raise ConfigError(f"tasks.include_path names a folder that does not exist: {folder}")
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(folder).rglob("*.yaml")):
        config = _read(path)
        name = config.get("task")
        if not isinstance(name, str):  # a file that others include, or a group
            continue
        if name in found:
            raise ConfigError(f"tasks.include_path holds two tasks with the name {name}")
        found[name] = config
    if not found:
        raise ConfigError(f"tasks.include_path holds no YAML file that names a task: {folder}")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.load(path.read_text(), Loader=_Text)  # noqa: S506 (a SafeLoader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the task file {path} can't be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(config, dict):
        return {}
    base: dict[str, Any] = {}
    included = config.pop("include", [])
    for other in included if isinstance(included, list) else [included]:
        base |= _read(path.parent / other)
    return base | config


def digest(folder: str) -> str:
    """sha256 (hex) of an own folder: its files, and the tasks with what they include from elsewhere."""
    total = hashlib.sha256(json.dumps(own_tasks(folder), sort_keys=True, default=str).encode())
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        if path.suffix in (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".txt", ".parquet", ".arrow"):
            total.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()} ".encode())
    return total.hexdigest()
