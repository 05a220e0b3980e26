"""The methods of a cell, built from its config, and whether the requested sparsity says anything about them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.values import did_you_mean

if TYPE_CHECKING:
    from harness.execution.method import Method

UNREAD = 0.5  # of a method that does not read its sparsity, but for 0, which may mean off


def build_methods(config: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Build the nested methods, outermost first. Raises `ConfigError` for an option that a method does not have.

    A sparsity of None is that of a method which something else settles.
    """
    methods = []
    for name, options in config.items():
        factory = _class(name, str(options["_target_"]))
        known = [field.name for field in fields(factory)]
        given = {key: value for key, value in options.items() if key != "_target_"}
        for key in given:
            if key not in known:
                raise ConfigError(f"method {name} has no option {key!r}{did_you_mean(key, known)}")
        if "sparsity" in given and given["sparsity"] is None:
            given["sparsity"] = UNREAD
        try:
            methods.append(factory(**given))
        except TypeError as error:
            raise ConfigError(f"method {name}: {error}") from error
    return settled(methods)


def _class(name: str, target: str) -> Any:
    """The method's class. Raises `ConfigError` where `_target_` names none."""
    module, _, cls = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, ValueError) as error:
        where = " (is its folder in PYTHONPATH?)" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"_target_={target} of method {name} can't be imported: {error}{where}") from error
    if not isinstance(found, type) or not is_dataclass(found) or not hasattr(found, "batch_coupled"):
        raise ConfigError(f"_target_={target} of method {name} is no method: it must derive from Method")
    return found


def own_target(target: str) -> type[Method] | None:
    """The class that a stored config's `_target_` names, if it is one of this project's methods; else None.

    Whoever reads a folder of somebody else's imports nothing else for it.
    """
    module, _, cls = target.rpartition(".")
    if not re.fullmatch(r"methods\.\w+", module):
        return None
    try:
        found: Any = getattr(importlib.import_module(module), cls, None)
    except ImportError:
        return None
    known = isinstance(found, type) and is_dataclass(found) and hasattr(found, "version")
    return found if known else None


def settled(methods: Sequence[Method]) -> list[Method]:
    """The same nest: the requested sparsity is for the innermost, a swap outside of it keeps its natural zeros."""
    return [replace(m, sparsity=0.0) if keeps_natural(m, methods) else m for m in methods]


def phase_of(methods: Sequence[Method]) -> str:
    """The phase policy of a nest where none is asked for: the first that all methods allow."""
    allowed = set(methods[0].phases).intersection(*(m.phases for m in methods))
    return next((phase for phase in methods[0].phases if phase in allowed), methods[0].phases[0])


def in_order(methods: Sequence[Method]) -> tuple[list[Method], list[Method]]:
    """(those that are fitted first, outermost first; those that compensate for them, fitted last)."""
    return [m for m in methods if not m.compensates], [m for m in methods if m.compensates]


def incomplete(methods: Sequence[Method]) -> str | None:
    """One sentence where methods stand beside others with which they mean nothing, or None.

    One that compensates for others, or wraps them, has none to do so for; or one turns the inputs that those outside of
    it know.
    """
    others, repairs = in_order(methods)
    for at, method in enumerate(others):
        if method.rotates and (outer := [m.name for m in others[:at] if m.knows_inputs]):
            return f"{method.name} turns the inputs that {outer[0]} knows: put it outside, [{method.name},{outer[0]}]"
    if repairs and (done := [m.name for m in others if m.compensated]):
        return f"{done[0]} makes up for what it drops itself, so {repairs[0].name} beside it would do so twice"
    if any(m.name != "dense" and not m.wraps for m in others):
        return None
    for method in methods:
        if method.compensates:
            return f"{method.name} makes up for what another method drops: nest it, method=[{method.name},teal]"
        if method.wraps:
            return (
                f"{method.name} changes nothing by itself: nest a method that drops in it, method=[{method.name},teal]"
            )
    return None


def keeps_natural(method: Method, methods: Sequence[Method]) -> bool:
    """Whether it is a swap outside of another method, which no requested sparsity reaches."""
    return method.swap and method is not methods[-1]


def reads_level(methods: Sequence[Method]) -> bool:
    """Whether the requested sparsity settles anything: a level, or that nothing is skipped at 0."""
    asked = [m for m in methods if not keeps_natural(m, methods)]
    return any(m.has_level for m in asked) or all(m.sparsity == 0 and not m.sites for m in asked)
