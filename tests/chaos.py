"""Sweeps that are killed at random moments and started again, by every engine that runs here.

`python -m tests.chaos --runs local=120,processes=40 --out results/bench/chaos.json` kills a small sweep in each run by
SIGKILL, SIGTERM or Ctrl-C, half of the time twice, starts it again, and counts what must not happen: a cell that is
missing or differs from the uninterrupted run, a probe or a fit that is made again after it was committed, a lock, a
draft or a process that is left. Counts of former calls of the same commands are added to.

A process that imports torch takes seconds, a sweep on a tiny model one: this one imports everything once and forks a
driver for each start, which forks what `workers=2` would start anew (the moments of a kill would all be moments of an
import). What Slurm and Ray start are new processes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
BAD = ("lost", "different", "made_twice", "left_files", "left_processes", "unfinished")
TOKEN = "DYNACT_CHAOS"  # in the environment of all that a run starts
PATIENCE_S = 600.0
SETTLE_S = 60.0  # for what an engine tells to end: Slurm asks politely first
ENGINES = {
    "local": [],
    "processes": ["workers=2"],
    "slurm": ["engine=slurm", "engine.sbatch.cpus_per_task=1", "engine.sbatch.time=30"],
    "ray": ["engine=ray"],
}


def sweep(model: Path) -> list[str]:
    """Five cells, ten probes and a fit."""
    text = model / "text.txt"
    return [
        *("-m", "model=local", f"model.path={model}", "method=random,teal", "sparsity=0.3,0.5", "tasks=none"),
        *("probe.names=[quality,sparsity]", "probe.perplexity.windows=2", "probe.perplexity.kl_windows=1"),
        *("probe.perplexity.window=32", "probe.sparsity.windows=2", "calibration.tokens=64", "calibration.window=32"),
        *("dtype=float32", "device=cpu", "logger=none", f"calibration.path={text}", f"probe.perplexity.path={text}"),
    ]


def tiny_model(folder: Path) -> Path:
    """A random Llama with a tokenizer of some hundred words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import save_with_tokenizer

    words = [f"w{number}" for number in range(200)]
    known = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    plain = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    save_with_tokenizer(folder, tokenizer)
    draw = random.Random(0)
    (folder / "text.txt").write_text(" ".join(draw.choice(words) for _ in range(600)))
    return folder


def forked(do: Callable[[], int], log: Path | None = None) -> int:
    """Start a process that does this and ends with its exit code; returns its number. log: what it prints."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setsid()
        if log is not None:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(handle, stream)
        for number in SIGNALS[1:]:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        code = do()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Forked:
    """What `subprocess.Popen` gives of a worker, of one that is forked with all imports done."""

    def __init__(self, *_: object, cwd: Path | None = None, env: dict[str, str] | None = None, **__: object) -> None:
        from harness.run import worker

        theirs, orders = os.pipe()
        answers, out = os.pipe()

        def work() -> int:
            os.dup2(theirs, 0)
            os.dup2(out, 1)
            os.closerange(3, 1024)  # others' pipes too: the end of a process must be the end of its pipe
            sys.stdin = os.fdopen(0)
            os.environ.update(env or {})
            return worker.main()

        self.pid, self.returncode = forked(work), None
        os.close(theirs)
        os.close(out)
        self.stdin, self.stdout = os.fdopen(orders, "w"), os.fdopen(answers)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        if self.returncode is None:
            self.returncode = ended(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("worker", timeout)
        return self.returncode


def ended(pid: int, within_s: float) -> int | None:
    """The exit code of a process (negative: a signal), or None where it still runs after so long."""
    deadline = time.monotonic() + within_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


@dataclass
class Chaos:
    """One engine under fire. took: seconds of an uninterrupted run."""

    engine: str
    model: Path
    folder: Path
    draw: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    took: float = 0.0

    def start(self, results: Path) -> int:
        """The command, as a user gives it."""
        from harness.run import app, child

        arguments = [*sweep(self.model), *ENGINES[self.engine], f"results={results}"]

        def run() -> int:
            os.environ[TOKEN] = mark(results)
            home = results.with_suffix(".home")
            home.mkdir(exist_ok=True)
            os.chdir(home)
            if self.engine == "processes":
                child.subprocess = types.SimpleNamespace(**vars(subprocess) | {"Popen": Forked})
            return app.main(arguments)

        return forked(run, results.with_suffix(".log"))

    def reference(self) -> Path:
        """An uninterrupted run, timed the second time, when all is read and imported."""
        for name in ("warm", "reference"):
            began = time.monotonic()
            code = ended(self.start(self.folder / name), PATIENCE_S)
            self.took = time.monotonic() - began
            assert code == 0, (self.folder / f"{name}.log").read_text()[-3000:]
        return self.folder / "reference"

    def run(self, number: int, reference: Path) -> None:
        """Kill, start again, look."""
        results = self.folder / f"run-{number}"
        kept: dict[str, int] = {}
        for _ in range(self.draw.choice((1, 2))):
            pid = self.start(results)
            code = ended(pid, self.draw.uniform(0, self.took))
            if code is None:
                fatal = self.draw.choice(SIGNALS)
                os.kill(pid, fatal)
                code = ended(pid, PATIENCE_S)
                self.counts[f"killed by {fatal.name}"] += 1
                done = len(kept_now := commits(results))
                self.counts[f"with {'no' if not done else 'some' if done < 10 else 'all'} probes committed"] += 1
                kept |= kept_now
        code = ended(self.start(results), PATIENCE_S)
        self.counts["runs"] += 1
        verdict = results.with_suffix(".json")
        looked = ended(
            forked(lambda: look(results, reference, kept, verdict), results.with_suffix(".look")), PATIENCE_S
        )
        found = json.loads(verdict.read_text()) if looked == 0 else {"unfinished": 1}
        found["unfinished"] = found.get("unfinished", 0) + (code != 0)
        found["left_processes"] = len(left_processes(results))
        self.counts.update({name: found.get(name, 0) for name in BAD})
        if any(found.values()):
            print(f"{self.engine} run {number}: exit code {code}: {found}; see {results}", flush=True)
        else:
            subprocess.run(["rm", "-rf", str(results)], check=True)


def commits(results: Path) -> dict[str, int]:
    """Probe and fit -> when it was committed."""
    files = [*results.glob("cells/*/probes/[!.]*/rows.parquet"), *results.glob("fits/*.safetensors")]
    return {str(path.relative_to(results)): path.stat().st_mtime_ns for path in files if path.exists()}


def look(results: Path, reference: Path, kept: dict[str, int], verdict: Path) -> int:
    """Count what must not be, into `verdict`."""
    from harness.results.collect import read_table
    from harness.results.store import Store
    from tests.runner import measured

    store, whole = Store(results), Store(reference)
    now = commits(results)
    done = [name for name in store.cells() if store.view(name).status["status"] == "done"]
    # A lock file that nobody holds (.guard, fits/*.lock) is how the next one waits its turn: it stays.
    left = [p for p in results.rglob("*") if p.name == "lock.json" or (p.name.startswith(".") and p.name != ".guard")]
    left += [p for p in results.glob("fits/*") if p.suffix in (".layers", ".part")]
    mine, theirs = (measured(read_table(root / "table.parquet")) for root in (results, reference))
    made = Counter(store.fits.made())
    found = {
        "lost": len(set(whole.cells()) - set(done)) + len(set(commits(reference)) - set(now)),
        "different": int(not mine.equals(theirs)) + len(set(store.cells()) - set(whole.cells())),
        "made_twice": sum(now.get(name) != at for name, at in kept.items()) + sum(n - 1 for n in made.values()),
        "left_files": len(left),
    }
    verdict.write_text(json.dumps(found))
    print(found, *left, sep="\n")
    return 0


def mark(results: Path) -> str:
    """What the processes of a run have in their environment."""
    return str(results)


def left_processes(results: Path) -> list[int]:
    """What a run started and is still there after a while, by its environment or (forked ones) by its folder."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                told = f"{TOKEN}={mark(results)}\0".encode() in (entry / "environ").read_bytes()
                if told or os.readlink(entry / "cwd") == str(results.with_suffix(".home")):
                    found.append(int(entry.name))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def together(model: Path, folder: Path, many: int = 4) -> dict[str, int]:
    """So many commands at once on one folder: what must not be, and how many ended well."""
    chaos = Chaos("local", model, folder, random.Random(0))
    reference, results = chaos.reference(), folder / "together"
    pids = [chaos.start(results) for _ in range(many)]
    codes = [ended(pid, PATIENCE_S) for pid in pids]
    verdict = folder / "together.json"
    assert ended(forked(lambda: look(results, reference, {}, verdict), folder / "look.log"), PATIENCE_S) == 0
    return json.loads(verdict.read_text()) | {"ended_well": codes.count(0)}


def preload(model: Path, folder: Path) -> None:
    """Import here what a run imports, but start nothing that a fork would not survive."""
    from harness.run.app import main

    names = folder / "modules.json"

    def run() -> int:
        code = main([*sweep(model), f"results={folder / 'preload'}"])
        names.write_text(json.dumps([name for name in sys.modules if name != "__main__"]))
        return code

    assert ended(forked(run, folder / "preload.log"), PATIENCE_S) == 0, (folder / "preload.log").read_text()[-3000:]
    for name in json.loads(names.read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


@contextlib.contextmanager
def place(engine: str, folder: Path) -> Iterator[None]:
    """Where an engine runs: a cluster for Slurm, nothing special for the others."""
    if engine != "slurm":
        yield
        return
    from tests import slurm_cluster

    with slurm_cluster.cluster(folder / "slurm") as environment:
        os.environ |= environment
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="local=6", help="engine=count, separated by commas")
    parser.add_argument("--together", action="store_true", help="also four commands at once on one folder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = int(time.time()) if args.seed is None else args.seed
    wanted = {name: int(count) for name, _, count in (part.partition("=") for part in args.runs.split(",") if part)}
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    model = tiny_model(folder / "model")
    preload(model, folder)
    results: dict[str, Any] = {}
    for engine, count in wanted.items():
        chaos = Chaos(engine, model, folder / engine, random.Random(f"{seed} {engine}"))
        chaos.folder.mkdir()
        with place(engine, chaos.folder):
            reference = chaos.reference()
            for number in range(count):
                chaos.run(number, reference)
                results[engine] = dict(sorted((chaos.counts + Counter()).items())) | {n: chaos.counts[n] for n in BAD}
                if args.out:
                    write(args.out, engine, results[engine], number == 0)
        print(f"{engine}: {results[engine]}", flush=True)
    if args.together:
        (folder / "four").mkdir()
        results["together"] = together(model, folder / "four")
    print(json.dumps(results), flush=True)
    bad = sum(counts.get(name, 0) for counts in results.values() for name in BAD)
    if not bad:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    return int(bad > 0)


BEFORE: dict[str, dict[str, int]] = {}


def write(out: Path, engine: str, counts: dict[str, int], first: bool) -> None:
    """Add these counts to those that the file had before this call."""
    from harness.results.environment import environment

    held = json.loads(out.read_text()) if out.exists() else {}
    engines = held.get("engines", {})
    if first:
        BEFORE[engine] = engines.get(engine, {})
    engines[engine] = {n: BEFORE[engine].get(n, 0) + counts.get(n, 0) for n in sorted({*BEFORE[engine], *counts})}
    total = {name: sum(each.get(name, 0) for each in engines.values()) for name in ("runs", *BAD)}
    facts = environment()
    where = {name: facts[name] for name in ("cpu", "cores", "python", "packages", "git") if name in facts}
    out.parent.mkdir(parents=True, exist_ok=True)
    held = {
        "what": __doc__.splitlines()[0],
        "command": "python -m tests.chaos --runs ENGINE=COUNT,... --out FILE",
        "total": total,
        "engines": engines,
        "environment": where | {"system": platform.platform()},
    }
    out.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
