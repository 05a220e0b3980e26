"""From the command line's words to composed configs, one a cell. Hydra reads and composes them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Container, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from harness.errors import ConfigError
from harness.places import CONF
from harness.run.checks import options
from harness.run.keys import check_keys
from harness.values import did_you_mean

GROUPS = ("model", "method", "tasks", "probe", "data", "logger", "size", "experiment", "engine")
OF_ANY_MODEL = (
    "model.weight_format",
    "model.weight_group",
    "model.device_map",
    "model.adapter",
    "model.seed",
)  # no file needs to name these keys
# Groups of which each file fills one node by itself: a sweep over them need not compose everything anew.
MOUNTED = ("model", "method")
OF_EXPERIMENTS = ("grid", "sweeps")  # what sweeps are made from: no cell reads it


def rewrite(overrides: list[str], multirun: bool) -> list[str]:
    """Check group names early, and allow `tasks=piqa` or `tasks=[piqa,sciq]` beside the names of task lists."""
    rewritten = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not an override: write key=value")
        bare, value = key.lstrip("+~"), _quoted(value)
        override = f"{key}={value}"
        if bare == "tasks" and not all(v in options("tasks") for v in value.split(",")):
            inner = value.strip("[]")
            override = (
                f"tasks.names=[{inner}]" if value.startswith("[") or not multirun else f"tasks.names={_listed(inner)}"
            )
        elif bare in OF_ANY_MODEL and not key.startswith("~"):
            override = f"++{bare}={value}"
        elif bare in GROUPS and bare != "experiment":
            for name in value.replace("[", "").replace("]", "").split(","):
                if name.strip() not in options(bare):
                    raise _unknown(bare, name)
        elif bare == "experiment" and value not in (*options("experiment"), "null"):
            raise _unknown(bare, value)
        elif bare.startswith("method."):
            name = bare.split(".")[1]
            own = any(o.lstrip("+").startswith(f"method.{name}._target_=") for o in overrides)  # a method of the user's
            if name not in options("method") and not own:
                raise _unknown("method", name)
            if multirun and not key.startswith("+"):
                override = "++" + override  # a sweep's base config may hold another method
        rewritten.append(override)
    return rewritten


def _quoted(value: str) -> str:
    """A path with letters beyond ASCII in quotes, without which Hydra reads none."""
    if value.isascii() or set(value) & set("'\"[]{}()"):
        return value
    return ",".join(part if part.isascii() else f"'{part}'" for part in value.split(","))


def _unknown(group: str, name: str) -> ConfigError:
    """The error for a name that a config group does not have."""
    known = options(group)
    return ConfigError(f"{group}={name} is unknown{did_you_mean(name, known)}: choose from {', '.join(known)}")


def _listed(names: str) -> str:
    """piqa,sciq -> [piqa],[sciq]: one list of tasks for each value of a sweep."""
    return ",".join(f"[{name}]" for name in names.split(","))


def parse(overrides: list[str]) -> list[Override]:
    """Hydra's own reading of overrides."""
    return [_parsed(override) for override in overrides]


@lru_cache(maxsize=4096)
def _parsed(override: str) -> Override:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise ConfigError(f"{override!r} can't be read: {str(error).splitlines()[0]}") from error


def expand(overrides: list[str]) -> list[list[str]]:
    """Every combination of a sweep, in Hydra's order."""
    try:
        axes = [
            [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
            if o.is_sweep_override()
            else [str(o.input_line)]
            for o in parse(overrides)
        ]
    except HydraException as error:
        raise _one_sentence(error) from error
    return [list(combination) for combination in itertools.product(*axes)]


def opening(overrides: list[str]) -> dict[str, Any]:
    """What holds for all cells of a command: the config without what is swept over.

    A key that every cell must name may be missing here: nothing but the keys of the run is read of it.
    """
    with _composed([o for o in parse(overrides) if not o.is_sweep_override()]) as cfg:
        return to_plain(cfg, whole=False)


def composed(overrides: list[str]) -> dict[str, Any]:
    """The resolved config of one cell as plain types. Raises `ConfigError` with one sentence."""
    parsed = parse(overrides)
    if several := next((o.input_line for o in parsed if o.is_sweep_override()), None):
        raise ConfigError(f"{several} names several values: a sweep over them begins with `python run.py -m`")
    with _composed(parsed, without="sweeps") as cfg:
        return to_plain(cfg, without=OF_EXPERIMENTS)


def to_plain(cfg: DictConfig, whole: bool = True, without: Container[str] = ()) -> dict[str, Any]:
    """Resolve interpolations; drop options given for a method that this cell of a sweep does not use.

    whole: refuse a config in which a key that must be given is missing. without: keys that are not asked for.
    """
    plain: dict[str, Any] = {}
    try:
        for key in cfg:
            if key not in without and (whole or not OmegaConf.is_missing(cfg, key)):
                value = cfg[key]
                if isinstance(value, DictConfig | ListConfig):
                    value = OmegaConf.to_container(value, resolve=True, throw_on_missing=whole)
                plain[str(key)] = value
    except OmegaConfBaseException as error:
        raise _one_sentence(error) from error
    plain["method"] = {name: value for name, value in plain["method"].items() if value and "_target_" in value}
    return plain


@contextmanager
def _composed(overrides: list[Override], without: str | None = None) -> Iterator[DictConfig]:
    """What Hydra's `compose` gives, but choices of groups that were made before are not composed again.

    It is lent: the same config serves the next cell, with what this one's overrides touch put back.
    without: a key to leave empty.
    """
    chosen, mounted, values = [], [], []
    for override in overrides:
        key, plain = override.key_or_group, override.package is None and not (override.is_add() or override.is_delete())
        if key in MOUNTED and plain:
            mounted.append((key, str(override.input_line)))
        elif key.partition("/")[0].partition(".")[0] == "hydra" or key in GROUPS or "/" in key:
            chosen.append(str(override.input_line))
        else:
            values.append(override)
    try:
        if not all(_alone(tuple(chosen), key) for key, _ in mounted):
            chosen, mounted = [*chosen, *(line for _, line in mounted)], []
        cfg = _mounted(tuple(chosen), tuple(mounted), without)
        check_keys(cfg, values)
        with _put_back(cfg, [_place(cfg, override.key_or_group) for override in values]):
            ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
            yield cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise _one_sentence(error) from error


@contextmanager
def _put_back(cfg: DictConfig, places: list[tuple[DictConfig, str]]) -> Iterator[None]:
    """Whatever happens inside to a key of a node is undone. Copying all of a config is what takes long in a sweep."""
    before = [(node, key, copy.deepcopy(_held(node).get(key)), list(_held(node))) for node, key in places]
    try:
        yield
    finally:
        for node, key, value, order in reversed(before):
            held = {**_held(node), key: value}
            node.__dict__["_content"] = {name: held[name] for name in order}


def _held(node: DictConfig) -> dict[Any, Any]:
    """A node's own entries, as they are: nothing is resolved."""
    held: Any = node._content
    return held


def _place(cfg: DictConfig, path: str) -> tuple[DictConfig, str]:
    """The node, and its key, below which an override of this path (a.b.c) changes things."""
    *above, last = path.split(".")
    for key in above:
        inner = _held(cfg).get(key)
        if not isinstance(inner, DictConfig) or inner._is_none() or inner._is_interpolation():
            return cfg, key
        cfg = inner
    return cfg, last.partition("[")[0]


@lru_cache(maxsize=256)
def _mounted(choices: tuple[str, ...], mounted: tuple[tuple[str, str], ...], without: str | None) -> DictConfig:
    """Composed choices, with the files of some groups in place."""
    cfg = copy.deepcopy(_base(choices, without))
    OmegaConf.set_struct(cfg, False)
    for key, line in dict(mounted).items():
        cfg[key] = _files(key, line)
    OmegaConf.set_struct(cfg, True)
    return cfg


@lru_cache(maxsize=256)
def _base(choices: tuple[str, ...], without: str | None = None) -> DictConfig:
    if without is not None:
        cfg = copy.deepcopy(_base(choices))
        cfg[without] = None  # an experiment's list of sweeps is no part of a cell, and resolving it takes longest
        return cfg
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        try:
            return compose("config", overrides=list(choices))
        except ValueError as error:  # of a group that is given no name
            raise _one_sentence(error) from error


@lru_cache(maxsize=256)
def _files(group: str, override: str) -> DictConfig:
    """The files of a group that an override names, one over the other."""
    value = parse([override])[0].value()
    names = value if isinstance(value, list) else [value]
    merged = OmegaConf.merge(*(OmegaConf.load(CONF / group / f"{name}.yaml") for name in names))
    assert isinstance(merged, DictConfig)
    return merged


@lru_cache(maxsize=256)
def _alone(choices: tuple[str, ...], group: str) -> bool:
    """Whether nothing but the group's own file (no experiment, no size) has filled its node."""
    default = OmegaConf.load(CONF / "config.yaml").defaults
    name = next(entry[group] for entry in default if isinstance(entry, DictConfig) and group in entry)
    own = OmegaConf.to_container(_files(group, f"{group}={name}"))
    return own == OmegaConf.to_container(_base(choices)[group])


def _one_sentence(error: Exception) -> ConfigError:
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{error.full_key} must be given: {error.full_key}=")
    lines = [line for line in str(error).splitlines() if line.strip()]
    return ConfigError(" ".join(lines[:2]))
