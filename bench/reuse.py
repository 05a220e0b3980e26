"""What a sweep adds to its own forward passes: 2 methods x 4 sparsities in one process, in eight, and as plain lm-eval.

Three things are timed, in fresh processes and folders, round by round: the sweep by run.py; the same cells a process
each (the dense cell is made in the first); and eight plain lm-eval runs (HFLM, dense) of the same tasks and items, a
process each. The sweep's forward passes are the time inside of the model's own calls, masks and all;
`over_forward` is what loading, fitting, scoring and storing add. Goals: at most 1.15, and 0.5 of either other way. Both
are told in seconds by the clock and in seconds of the CPU, which others at work on the machine hardly change.

Run: python -m bench.reuse --out results/bench/reuse.json
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.record import where, write
from bench.rounds import ratio
from harness.data.assets import embedded_model_dir

METHODS, LEVELS = ("teal", "cats"), ("0.3", "0.4", "0.5", "0.6")
PREAMBLE = "import os, sys, time; os.environ.setdefault('TQDM_DISABLE', '1')\n"
# run.py with every forward pass of the model timed, and the sum told at the end.
FORWARD = (
    PREAMBLE
    + """
import torch
from transformers.modeling_utils import PreTrainedModel
from harness.run.app import main
spent, depth = [0.0, 0.0], [0]
call = torch.nn.Module.__call__
def timed(self, *args, **kwargs):
    if not isinstance(self, PreTrainedModel) or depth[0]:
        return call(self, *args, **kwargs)
    depth[0] += 1
    start, cpu = time.perf_counter(), time.process_time()
    try:
        return call(self, *args, **kwargs)
    finally:
        spent[0] += time.perf_counter() - start
        spent[1] += time.process_time() - cpu
        depth[0] -= 1
PreTrainedModel.__call__ = timed
code = main(sys.argv[1:])
print("FORWARD", *spent, file=sys.stderr)
sys.exit(code)
"""
)
PLAIN = (
    PREAMBLE
    + """
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from harness.data.tasks import load_tasks, task_manager
folder, tasks, limit, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=8, device="cpu")
simple_evaluate(model=lm, tasks=load_tasks(tasks.split(",")), task_manager=task_manager(), limit=int(limit),
                bootstrap_iters=100, log_samples=True)
"""
)


def cpu_of_children() -> float:
    """Seconds of the CPU that processes of this one took which have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(*command: str) -> tuple[np.ndarray, str]:
    """([seconds by the clock, of the CPU], stderr) of a Python process that must succeed."""
    start, cpu = time.perf_counter(), cpu_of_children()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return np.array([time.perf_counter() - start, cpu_of_children() - cpu]), done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/bench/reuse.json"))
    parser.add_argument("--tasks", default="piqa,arc_easy,lambada_openai")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    common = [f"tasks.names=[{args.tasks}]", f"tasks.limit={args.limit}", "probe.names=[quality]", "batch_size=8"]
    common += [f"dtype={args.dtype}", "device=cpu", "logger=none"]
    common += ["probe.perplexity.windows=4", "probe.perplexity.kl_windows=0"]
    folder = str(embedded_model_dir())
    ways = ("one sweep", "its forward passes", "eight processes", "eight lm-eval")
    times: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as root:
            sweep = [
                "-m",
                f"method={','.join(METHODS)}",
                f"sparsity={','.join(LEVELS)}",
                *common,
                f"results={root}/one",
            ]
            seconds, said = timed("-c", FORWARD, *sweep)
            times["one sweep"].append(seconds)
            told = next(line for line in said.splitlines() if line.startswith("FORWARD"))
            times["its forward passes"].append(np.array([float(word) for word in told.split()[1:]]))
            cells = [
                [f"method={m}", f"sparsity={s}", *common, f"results={root}/eight"] for m in METHODS for s in LEVELS
            ]
            times["eight processes"].append(np.sum([timed("run.py", *cell)[0] for cell in cells], axis=0))
        plain = [timed("-c", PLAIN, folder, args.tasks, str(args.limit), args.dtype)[0] for _ in cells]
        times["eight lm-eval"].append(np.sum(plain, axis=0))
    names = {"its forward passes": "over_forward", "eight processes": "of_processes", "eight lm-eval": "of_lm_eval"}
    kinds: dict[str, dict[str, list[float]]] = {
        kind: {way: [float(one[index]) for one in found] for way, found in times.items()}
        for index, kind in enumerate(("wall", "cpu"))
    }
    ratios = {
        kind: {short: ratio(found["one sweep"], found[name]) for name, short in names.items()}
        for kind, found in kinds.items()
    }
    result = {
        "what": "one sweep of 2 methods x 4 sparsities (and its dense cell) over its own forward passes, over eight "
        "processes of run.py, and over eight plain lm-eval runs; medians of paired rounds",
        "goals": {"over_forward": 1.15, "of_processes": 0.5, "of_lm_eval": 0.5},
        "tasks": args.tasks.split(","),
        "limit": args.limit,
        "dtype": args.dtype,
        "seconds": kinds,
        "ratio": ratios,
        "environment": where(),
    }
    write(args.out, result)
    for kind, found in kinds.items():
        for name, spent in found.items():
            print(f"{kind:5s}{name:20s} {statistics.median(spent):7.1f} s")
        print(kind, "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios[kind].items()))


if __name__ == "__main__":
    main()
