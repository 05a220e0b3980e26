"""The arrows of the design, held by the import graph: floors, no circles, who may know what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. A room may import from its own floor and from those below, never from above.
FLOORS = (
    ("errors", "files", "reading", "progress", "console", "arguments", "places", "values"),
    ("model", "data"),
    ("results", "fitting"),
    ("execution", "training"),
    ("probes",),
    ("claims",),
    ("figures",),
    ("report",),
    ("run",),
    ("cli", "__main__"),
)
VOCABULARY = ("harness.errors", "harness.progress", "harness.model", "harness.fitting", "harness.execution")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions: "harness.model.view" for a name of it too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: write imports in full"
            yield node.module
            if ((ROOT / node.module.replace(".", "/")) / "__init__.py").exists():
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ROOMS = ("dynact", "harness", "methods", "kernels")
FILES = {module(path): path for room in ROOMS for path in (ROOT / room).rglob("*.py")}
GRAPH = {name: {m for m in imports(path) if m in FILES and m != name} for name, path in FILES.items()}


def floor(name: str) -> int | None:
    room = name.split(".")[1] if "." in name else None
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


def test_every_file_of_the_harness_stands_on_a_floor():
    assert [name for name in FILES if name.startswith("harness.") and floor(name) is None] == []


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("harness.")])
def test_a_room_knows_no_room_above_it(name):
    above = [m for m in GRAPH[name] if m.startswith("harness.") and floor(m) > floor(name)]
    assert above == [], f"{name} imports from above: {above}"


def test_there_are_no_circles():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for needed in sorted(GRAPH[name]):
                if not name.startswith(f"{needed}."):  # a package's own __init__ is loaded before its files anyway
                    visit(needed, (*path, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())


def test_the_harness_names_no_method():
    naming = {
        name for name in FILES if name.startswith("harness") and any(m.startswith("methods") for m in GRAPH[name])
    }
    assert not naming


def test_kernels_know_tensors_only():
    outside = {name: [m for m in GRAPH[name] if not m.startswith("kernels")] for name in FILES if "kernels" in name[:7]}
    assert not any(outside.values()), outside


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("methods.")])
def test_methods_use_the_vocabulary_only(name):
    strange = [m for m in GRAPH[name] if not m.startswith((*VOCABULARY, "methods"))]
    assert strange == [] or name == "methods.lte", strange  # routers are trained beforehand: it reads a checkpoint
    assert not any(m.startswith(("transformers", "kernels", "hydra")) for m in imports(FILES[name]))


def test_only_families_know_the_inside_of_transformers():
    """Others may use its public classes, by `from transformers import ...`."""
    inside = {
        name
        for name, path in FILES.items()
        if any(m.startswith("transformers.") and m.split(".")[1] != "utils" for m in imports(path))
    }
    assert all(name.startswith("harness.model.families") for name in inside), inside


def test_the_library_door_is_above_all_and_names_no_method():
    doors = {name for name in FILES if name.startswith("dynact")}
    assert not {name for name in FILES if name not in doors and doors & GRAPH[name]}, "the house may not need its door"
    assert not {name for name in doors if any(m.startswith("methods.") for m in GRAPH[name])}
