"""One sitting on one or several GPUs: every text and run of some variants and seeds, one on each GPU at a time.

`python -m harness.training.sitting --model qwen2.5-coder-0.5b --minutes 25` prints what it will run, on which GPU and
about when, and runs it. The same command goes on in the next sitting, here or where the folder was carried to: what is
done is left alone, what was stopped goes on. Ends with 0 (all done), 3 (some is left) or 1 (something failed).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from harness.arguments import finish
from harness.console import complain, say, stderr, stdout, table
from harness.data.assets import EMBEDDED_MODEL
from harness.errors import ConfigError
from harness.places import CONF, ROOT
from harness.training import loop  # noqa: F401 - its Recipe is what conf/train's files are made of
from harness.training.data import pieces_of
from harness.training.students import called, checkpoint_name, command, find

VARIANTS = "control,relu,relu2"
START_S = 60.0  # of a process until its first step: imports, weights, compilation
WORTH_S = 120.0  # a run is not begun for less: it would end before its first states
UNFINISHED = 3  # as train.py ends where it was stopped


@dataclass(frozen=True)
class Job:
    """One process. seconds: about how long it takes; least: not begun with less left; done: the file it ends with."""

    name: str
    words: tuple[str, ...]
    seconds: float
    least: float
    reserve: float  # seconds that it needs after it was told to stop
    after: tuple[str, ...]
    done: Path


def jobs(model: str, variants: Sequence[str], seeds: Iterable[int], split: bool, more: Sequence[str] = ()) -> list[Job]:
    """What is left to do. split: pieces of text are jobs of their own. more: overrides of train.py for all.

    Raises ConfigError for a variant that goes on from one that is neither asked for nor there.
    """
    with initialize_config_dir(str(CONF), version_base="1.3"):
        configs = {v: compose("training", [f"model={model}", f"train={v}", *more]) for v in variants}
    for cfg in configs.values():
        cfg.model.name = called(cfg.model)
    found = [job for seed in seeds for job in _jobs_of(configs, seed, split, (f"model={model}", *more))]
    return [job for job in found if not job.done.exists()]


def _jobs_of(configs: Mapping[str, DictConfig], seed: int, split: bool, shared: tuple[str, ...]) -> Iterator[Job]:
    """All texts and runs of one seed, done or not."""
    cfg = next(iter(configs.values()))
    base, folder, pieces = cfg.model.name, Path(cfg.folder), pieces_of(seed, cfg.text.pieces)
    words = (*shared, f"train.seed={seed}")
    texts = []
    for some in [[piece] for piece in pieces] if split else [list(pieces)]:
        part = some[0] - pieces[0]
        texts.append(f"text {seed}" + (f"/{part}" if split else ""))
        own = (*words, "do=[text]", *([f"text.piece={part}"] if split else []))
        took = START_S + len(some) * cfg.text.tokens / cfg.budget.writes
        yield Job(texts[-1], own, took, START_S, 0.0, (), folder / "text" / f"heldout-{some[-1]}.safetensors")
    for variant, cfg in configs.items():
        recipe, name = cfg.train, checkpoint_name(base, variant, seed)
        before = []
        if recipe.init_from and "/" not in recipe.init_from:
            before = [checkpoint_name(base, recipe.init_from, seed)]
            there = (folder / before[0] / "adapter" / "adapter.json").exists() or find(before[0])
            if recipe.init_from not in configs and not there:
                made_by = command(base, recipe.init_from, seed)
                raise ConfigError(f"{name} goes on from {before[0]}, which is not there: ask for it too ({made_by})")
        run = (*words, f"train={variant}", "do=[train,evaluate]")
        took = START_S + recipe.steps * recipe.batch * recipe.length / cfg.budget.trains + cfg.budget.evaluates_s
        done = folder / name / "adapter" / "README.md"
        yield Job(name, run, took, START_S + WORTH_S, cfg.budget.evaluates_s, (*texts, *before), done)


def ready(waiting: Sequence[Job], unfinished: Iterable[str]) -> Job | None:
    """The job to begin next: none of those before it is unfinished, and most of the work hangs on it."""
    blocked = set(unfinished)
    known = {job.name: job for job in waiting}

    def hanging(job: Job) -> float:
        return job.seconds + max((hanging(other) for other in known.values() if job.name in other.after), default=0.0)

    free = [job for job in waiting if not blocked & set(job.after)]
    return max(free, key=hanging, default=None)


def plan(left: Sequence[Job], devices: Sequence[str]) -> list[tuple[str, float, Job]]:
    """(device, begin in seconds, job) as it would go with one job on each device and no deadline."""
    clock, waiting = 0.0, list(left)
    busy: dict[str, tuple[float, Job]] = {}
    planned = []
    while waiting or busy:
        for device in devices:
            unfinished = [job.name for job in waiting] + [job.name for _, job in busy.values()]
            if device not in busy and (job := ready(waiting, unfinished)) is not None:
                waiting.remove(job)
                busy[device] = (clock + job.seconds, job)
                planned.append((device, clock, job))
        clock = min(end for end, _ in busy.values())
        busy = {device: (end, job) for device, (end, job) in busy.items() if end > clock}
    return planned


def run(left: Sequence[Job], devices: Sequence[str], deadline: float, logs: Path) -> Mapping[str, int]:
    """Run the jobs until the deadline (of `time.monotonic`). Returns the exit code of each that was begun."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting, codes = list(left), dict[str, int]()
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = {}
    try:
        while True:
            for device, (job, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[device]
                    codes[job.name] = code
                    told = {0: "done", UNFINISHED: "stopped, goes on in the next sitting"}.get(code, f"failed ({code})")
                    said = (logs / _file(job)).read_text(errors="replace").strip().splitlines()
                    say(stdout(), f"{device}: {job.name} {told}: {said[-1] if said else ''}")
            for device in devices:
                unfinished = [j.name for j in waiting] + [j.name for j, _ in running.values()]
                unfinished += [name for name, code in codes.items() if code]
                job_now = ready(waiting, unfinished) if device not in running else None
                remaining = deadline - time.monotonic()
                if job_now is not None and remaining - job_now.reserve >= job_now.least:
                    waiting.remove(job_now)
                    limit = f"stop_after_s={remaining - job_now.reserve:.0f}"
                    words = [sys.executable, str(ROOT / "train.py"), *job_now.words, f"device={device}", limit]
                    say(stdout(), f"{device}: {job_now.name} begins, {remaining / 60:.1f} minutes are left")
                    with (logs / _file(job_now)).open("ab") as log:
                        running[device] = job_now, subprocess.Popen(words, stdout=log, stderr=log)
            if not running:
                return codes
            time.sleep(0.2)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _file(job: Job) -> str:
    return job.name.replace(" ", "-").replace("/", "-") + ".log"


def show(planned: Sequence[tuple[str, float, Job]]) -> None:
    """Print the plan: which command runs where, from which minute on, for about how long."""
    lines = table("the sitting")
    for heading in ("on", "from minute", "about minutes", "python train.py ..."):
        lines.add_column(heading, justify="left" if heading[0] in "op" else "right", overflow="fold")
    for device, begin, job in planned:
        lines.add_row(device, f"{begin / 60:.0f}", f"{job.seconds / 60:.1f}", " ".join(job.words))
    stdout().print(lines)
    end = max((begin + job.seconds for _, begin, job in planned), default=0.0)
    say(stdout(), f"{len(planned)} to run, about {end / 60:.0f} minutes in all")


def _devices(asked: str | None) -> list[str]:
    if asked:
        return asked.split(",")
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m harness.training.sitting", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--variants", default=VARIANTS, help=f"in any order (default: {VARIANTS})")
    parser.add_argument("--seeds", default="0", help="training seeds, as 1,2")
    parser.add_argument("--devices", help="as cuda:0,cuda:1 (default: every GPU)")
    parser.add_argument("--minutes", type=float, default=25.0, help="after which nothing runs any more (default: 25)")
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
    given, more = parser.parse_known_args(arguments)
    code = 0

    def do() -> None:
        nonlocal code
        began, devices = time.monotonic(), _devices(given.devices)
        seeds = [int(seed) for seed in given.seeds.split(",")]
        left = jobs(given.model, given.variants.split(","), seeds, len(devices) > 1, more)
        show(plan(left, devices))
        if given.plan or not left:
            return
        logs = left[0].done.parents[1] / "logs" if left[0].name.startswith("text") else left[0].done.parents[2] / "logs"
        codes = run(left, devices, began + 60 * given.minutes, logs)
        if failed := [name for name, ended in codes.items() if ended not in (0, UNFINISHED)]:
            complain(f"{', '.join(failed)} failed: {logs} says why")
            code = 1
        elif len(codes) < len(left) or any(codes.values()):
            say(stderr(), "some is left: the same command goes on")
            code = UNFINISHED

    return finish(do) or code


if __name__ == "__main__":
    sys.exit(main())
