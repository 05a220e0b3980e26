"""Damaged and hostile files, made from whole ones: their readers give back what lies there, or raise ConfigError.

`make fuzz` (python -m tests.fuzz --examples 100000 --out results/bench/fuzz.json) tries many; the default suite tries a
few of each. An input is a file with some bytes flipped, cut out, put in or repeated; a JSON or YAML tree in which some
nodes are others; a table in which columns are gone, renamed, retyped or filled with something else; or a command line.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from harness.errors import ConfigError
from harness.results.environment import environment
from harness.run.overrides import composed
from tests.fuzz_damage import altered_tree, files, words
from tests.fuzz_targets import Target, targets

SEED = 20261126


def strategy(target: Target) -> st.SearchStrategy[Any]:
    """What a target is given: a file's damaged content, or the argument of its reader."""
    if target.file is not None:
        return files(target.file.read_bytes(), target.file)
    if target.name.startswith("archive"):
        return altered_tree(_config())
    return words


def _config() -> Any:
    plain = composed(["method=teal", "tasks=none"])
    return {key: value for key, value in plain.items() if key not in ("logger", "results")}


def run(target: Target, examples: int, tally: Counter[str], number: int = 0) -> None:
    """Give a target so many inputs. Anything but ConfigError comes out, with the input that did it."""
    whole = None if target.file is None else target.file.read_bytes()

    @seed(SEED + number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy(target))
    def one(content: Any) -> None:
        tally["inputs"] += 1
        try:
            if target.file is None:
                target.read(content)
            else:
                target.file.write_bytes(content)
                target.read()
            tally["read"] += 1
        except ConfigError as error:
            assert str(error).strip() and "\n" not in str(error), "a sentence of one line"
            tally["refused"] += 1

    try:
        one()
    finally:
        if target.file is not None and whole is not None:
            target.file.write_bytes(whole)


def main() -> int:
    """Fuzz everything, and write how many inputs of each kind there were and what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    given_ = parser.parse_args()
    start, lines, wrong = time.time(), {}, []
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    found = [target for target in targets(root) if given_.only in target.name]
    share = sum(target.share for target in found)
    for number, target in enumerate(found):
        tally: Counter[str] = Counter(inputs=0, read=0, refused=0)
        count = math.ceil(given_.examples * target.share / share)
        began, part = time.time(), 0
        while tally["inputs"] < count and target.name not in wrong:  # hypothesis stops early where it runs out of news
            before = tally["inputs"]
            try:
                run(target, min(1000, count - tally["inputs"]), tally, 1000 * number + part)
            except BaseException as error:  # the report is what this is for
                if isinstance(error, KeyboardInterrupt):
                    raise
                wrong.append(target.name)
                print(f"{target.name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
                if given_.only:
                    raise
            part += 1
            if tally["inputs"] == before:
                break
        lines[target.name] = dict(tally)
        print(
            f"{target.name:36} {tally['inputs']:7} {tally['refused']:7} refused  {time.time() - began:6.1f} s",
            flush=True,
        )
    shutil.rmtree(root)
    total = {key: sum(line[key] for line in lines.values()) for key in ("inputs", "read", "refused")}
    print(total, "other errors:", len(wrong))
    if given_.out:
        result = {
            "what": "damaged and hostile files given to their readers; anything but ConfigError is another error",
            "inputs": total["inputs"],
            "other_errors": len(wrong),
            "seed": SEED,
            "seconds": round(time.time() - start),
            "total": total,
            "by_file": lines,
            "environment": {k: v for k, v in environment().items() if k in ("packages", "python", "git")},
        }
        given_.out.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
