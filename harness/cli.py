"""One entry point: `python -m harness COMMAND` or, once installed, `dynact COMMAND`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from harness.arguments import program
from harness.console import complain, say, stdout
from harness.values import did_you_mean

# Command -> where its `main(arguments)` is, and what it does. It is imported when it is asked for.
COMMANDS = {
    "run": ("harness.run.app", "run cells and sweeps: as run.py, with the same key=value overrides"),
    "claims": ("harness.claims.judge", "verdicts on the study's claims"),
    "figures": ("harness.figures.draw", "draw every figure that the rows allow"),
    "leaderboard": ("harness.report.leaderboard", "every scheme at equal achieved sparsity"),
    "report": ("harness.report.html", "one HTML page of everything"),
    "archive": ("harness.report.archive", "a study in one folder, to be kept"),
    "show": ("harness.report.show", "one cell: its config, status and rows"),
    "diff": ("harness.report.diff", "two cells side by side: what differs in config and rows"),
    "clean": ("harness.run.clean", "what nobody needs in a results folder; asks before it removes any of it"),
    "prefetch": ("harness.data.prefetch", "fetch and prepare all that the default run needs"),
    "texts": ("harness.data.text", "the texts that methods can learn from"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; 2 for a command that there is not."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--commands"]:  # for shell completion
        say(stdout(), " ".join(COMMANDS))
        return 0
    if not given or given[0] in ("-h", "--help"):
        usage()
        return 0 if given else 2
    name, *rest = given
    if name not in COMMANDS:
        complain(f"{name!r} is no command{did_you_mean(name, COMMANDS)}: choose from {', '.join(COMMANDS)}")
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest)


def usage() -> None:
    """Print the commands."""
    say(stdout(), f"usage: {program()} COMMAND [arguments]; {program()} COMMAND --help says more")
    for name, (_, about) in COMMANDS.items():
        say(stdout(), (f"  {name:<11}", "bold"), f" {about}")


def script() -> None:
    """The console command `dynact`."""
    sys.exit(main())
