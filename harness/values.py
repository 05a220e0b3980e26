"""Values of a config: each check returns what it was given, or raises `ConfigError` with one sentence."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness.errors import ConfigError


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A blank and "(did you mean teal?)", or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def number(value: Any, key: str) -> float:
    """The value, if it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ConfigError(f"{key} must be a number, not {value!r}")
    return float(value)


def whole(value: Any, key: str, at_least: int = 1) -> int:
    """The value, if it is a whole number that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{key} must be a whole number of at least {at_least}, not {value!r}")
    return value


def choice(value: Any, key: str, known: Sequence[str]) -> str:
    """The value, if it is a known one."""
    if value not in known:
        raise ConfigError(f"{key} must be one of {', '.join(known)}, not {value!r}{did_you_mean(str(value), known)}")
    return value


def listed(value: Any, key: str) -> list[Any]:
    """A list of several, or the one in it."""
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not found:
        raise ConfigError(f"{key} is empty")
    return found


def texts(value: Any, key: str) -> list[str]:
    """The value, if it is a list of texts."""
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{key} must be a list of names, not {value!r}")
    return list(value)


def is_file(path: str) -> bool:
    """Whether a file is there; what can't be the name of one is none."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def file_or_none(path: Any, key: str) -> None:
    """Nothing, if the path is None or a file's."""
    if path is not None and not (isinstance(path, str) and is_file(path)):
        raise ConfigError(f"{key} names a file that does not exist: {path}")
