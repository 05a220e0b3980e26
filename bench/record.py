"""What the file of every benchmark says of its run, and how it is written."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from harness.results.environment import environment


def where() -> dict[str, Any]:
    """Where a benchmark runs, and by which command."""
    return environment() | {"command": command(sys.argv)}


def command(argv: list[str]) -> str:
    """The command as anyone can type it. Files are committed, so paths of this machine are cut to what they end in."""
    bench, *words = argv
    return shlex.join(["python", "-m", f"bench.{Path(bench).stem}", *map(_anywhere, words)])


def _anywhere(word: str) -> str:
    option, equals, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    here = Path.cwd()
    return f"{option}{equals}{path.relative_to(here) if path.is_relative_to(here) else path.name}"


def write(out: Path, result: dict[str, Any]) -> None:
    """Write the file, into a new folder if need be. What JSON has no type for is written as text, so no run is lost."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1, default=str) + "\n")
