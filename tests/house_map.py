"""The map of the house in CONTRIBUTING.md, drawn from the import graph: `python -m tests.house_map` writes it anew."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from tests.marks import renewed
from tests.test_architecture import FILES, FLOORS, GRAPH, ROOT

PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- map: written by python -m tests.house_map -->", "<!-- end of the map -->"
OUTSIDE = ("dynact", "methods", "kernels")  # packages beside the harness


def room_of(name: str) -> str:
    """harness.run.cell -> harness/run; harness.errors -> harness; methods.teal -> methods."""
    parts = name.split(".")
    inside = parts[0] == "harness" and len(parts) > 1 and (ROOT / "harness" / parts[1]).is_dir()
    return f"harness/{parts[1]}" if inside else parts[0]


def uses() -> dict[str, set[str]]:
    """Room -> the other rooms that its files import from."""
    found: dict[str, set[str]] = {room_of(name): set() for name in FILES}
    for name, needed in GRAPH.items():
        found[room_of(name)] |= {room_of(m) for m in needed} - {room_of(name)}
    return found


def nearest(room: str, graph: Mapping[str, set[str]]) -> list[str]:
    """The rooms that it uses and that none of the others it uses would lead to."""

    def reached(start: str, seen: set[str]) -> set[str]:
        for following in graph[start] - seen:
            seen.add(following)
            reached(following, seen)
        return seen

    # The few single files of harness/ use nothing but one another and are used by all: no arrow to or from them.
    own = {other for other in graph[room] if other != "harness"}
    further = {far for near in own for far in reached(near, {room}) - {room, near}}
    return sorted(own - further)


def about(room: str) -> str:
    """The first sentences of a room's docstring, on one line."""
    tree = ast.parse((ROOT / room / "__init__.py").read_text())
    told = (ast.get_docstring(tree) or "").split("\n\n")[0]
    return " ".join(told.split())


def files(room: str) -> str:
    """The files of a room by name."""
    names = {path.stem for path in (ROOT / room).glob("*.py")} | {
        p.parent.name for p in (ROOT / room).glob("*/__init__.py")
    }
    if room == "methods":
        return f"{len(list((ROOT / 'conf/method').glob('*.yaml')))} schemes and what they share"
    inside = names - {"__init__", "__main__"}
    if room == "harness":  # its rooms have lines of their own
        inside -= {path.parent.name for path in (ROOT / room).glob("*/__init__.py")}
    return ", ".join(f"`{name}`" for name in sorted(inside))


def drawn() -> str:
    """The map as a table in Markdown, from the roof to the ground."""
    graph = uses()
    floors = [[f"harness/{name}" for name in rooms if (ROOT / "harness" / name).is_dir()] for rooms in FLOORS]
    order = ["dynact", *(room for rooms in reversed(floors) for room in sorted(rooms)), "harness", "methods", "kernels"]
    assert sorted(order) == sorted(graph), "every room has a line"
    lines = ["| room | what a reader finds there | files | stands on |", "| --- | --- | --- | --- |"]
    for room in order:
        on = ", ".join(other.removeprefix("harness/") for other in nearest(room, graph))
        lines.append(f"| [{room}]({room}) | {about(room)} | {files(room)} | {on} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the map drawn anew between its marks."""
    return renewed(page, BEGIN, drawn(), END)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
