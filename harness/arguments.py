"""The habit of every command: the results folder is positional, bad input is one sentence and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from harness.console import complain, say, stderr
from harness.errors import AssetError, ConfigError


def program() -> str:
    """What a user typed to get here: the console command, or the package."""
    return "dynact" if Path(sys.argv[0]).stem == "dynact" else "python -m harness"


class _Parser(argparse.ArgumentParser):
    """One sentence for arguments that make no sense, as for any other bad input."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message}: {self.prog} --help says what can be given")
        raise SystemExit(2)


def parser(command: str, about: str) -> argparse.ArgumentParser:
    """A parser of one command's arguments."""
    return _Parser(prog=f"{program()} {command}", description=about)


def add_results(to: argparse.ArgumentParser) -> None:
    """The results folder, or an archived study: positional, `results` by default."""
    told = "folder of the cells, or an archived study (default: results)"
    to.add_argument("results", nargs="?", type=Path, default=Path("results"), help=told)


def finish(do: Callable[[], None]) -> int:
    """Do it. Returns the exit code: 0, 2 where the user must mend something, 130 after Ctrl-C."""
    try:
        do()
    except (ConfigError, AssetError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        say(stderr(), "interrupted")
        return 130
    return 0
