"""What a command asks for, checked, and what is missing of it. Nothing is written here, and no model loaded."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data.assets import cache_dir
from harness.errors import ConfigError
from harness.run.config import CellConfig, check
from harness.run.overrides import composed, expand, opening, rewrite
from harness.values import choice, whole

if TYPE_CHECKING:
    from harness.results.store import State, Store

NEEDS_RUN = ("run", "partial", "stale")
OF_RUNS = ("workers", "on_error", "cells", "results", "archived", "sweeps", "logger", "plan", "dry", "retry", "force")
SWITCHES = ("plan", "dry", "retry", "retry_failed", "force")


@dataclass(frozen=True)
class Command:
    """settings: the keys of the run. sweeps: (overrides, whether they are to be expanded). cells: each one, checked."""

    settings: dict[str, Any]
    sweeps: list[tuple[list[str], bool]]
    cells: list[CellConfig]

    @property
    def launcher(self) -> bool:
        """Whether one of Hydra's own launchers is to run the cells."""
        return any(o.startswith("hydra/launcher") for o in self.sweeps[0][0])


def read(overrides: list[str], multirun: bool) -> Command:
    """Every cell of a command line. Raises `ConfigError` with one sentence, before torch or a model is loaded."""
    for named in (*overrides, str(Path.cwd()), str(cache_dir())):
        _utf8(named)
    overrides = rewrite(overrides, multirun)
    settings = opening(overrides)
    if lacking := [key for key in OF_RUNS if key not in settings]:
        raise ConfigError(f"{lacking[0]} has no value: give {lacking[0]}=")
    whole(settings["workers"], "workers")
    choice(settings["on_error"], "on_error", ("go_on", "stop"))
    choice(settings["cells"], "cells", ("all", "timed", "untimed"))
    for key in SWITCHES:
        if not isinstance(settings[key], bool):
            raise ConfigError(f"{key} must be true or false, not {settings[key]!r}")
    sweeps = [(overrides, multirun)]
    given = settings["sweeps"] or []
    if not isinstance(given, list) or not all(isinstance(sweep, list) for sweep in given):
        raise ConfigError(f"sweeps must be a list of lists of overrides, not {given!r}")
    if given:
        sweeps = [(overrides + [str(o) for o in sweep], True) for sweep in settings["sweeps"]]
    combinations = [c for given, many in sweeps for c in (expand(given) if many else [given])]
    cells = [check(composed(c)) for c in combinations]
    if settings["cells"] != "all":
        cells = [cell for cell in cells if cell.timed == (settings["cells"] == "timed")]
        if not cells:
            raise ConfigError(f"cells={settings['cells']} leaves no cell: what is asked for has none of that kind")
    command = Command(settings, sweeps, cells)
    engine = settings["engine"]
    if command.launcher and settings["cells"] != "all":
        raise ConfigError("hydra/launcher runs whatever a sweep holds: cells= is for this project's own engines")
    if command.launcher and (settings["workers"] > 1 or engine["name"] != "local"):
        raise ConfigError("workers=N and engine= start processes of their own: give either them or hydra/launcher")
    importlib.import_module(f"harness.run.engines.{engine['name']}").check(engine, settings["workers"])
    return command


def _utf8(text: str) -> None:
    """Raise `ConfigError` where a path holds bytes that are not UTF-8; Python keeps them as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{text} holds bytes that are not UTF-8, which tokenizers and tables can't name: "
            "rename that folder or file, or give a link to it"
        ) from error


def with_dense(cells: Sequence[CellConfig]) -> dict[str, CellConfig]:
    """The cells by id, each once, a dense cell before those that are compared with it."""
    found: dict[str, CellConfig] = {}
    for cell in cells:
        dense = cell.dense_cell()
        if dense is not None:
            found.setdefault(dense.id, dense)
        found.setdefault(cell.id, cell)
    return found


def states(cells: dict[str, CellConfig], store: Store) -> dict[str, State]:
    """What running each of these cells would do now."""
    from harness.run.cell import state_of

    return {name: state_of(cell, store) for name, cell in cells.items()}


def open_store(results: str) -> Store:
    """The results folder, if files can be written there."""
    from harness.results.store import Store

    store = Store(Path(results))
    store.check_writable()
    return store
