"""Harness overhead: masked TEAL at 0.5 against plain lm-eval on the dense model, same items and batch size, paired.

Run: python -m bench.overhead --out results/bench/overhead.json
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.record import where, write
from bench.rounds import ratio
from harness.data.assets import embedded_model_dir
from harness.data.tasks import load_tasks, task_manager
from harness.data.text import calibration_text, token_windows
from harness.execution.attach import attached
from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.lm import HarnessLM
from harness.model.step import Policy
from harness.run.machine import pick_dtype
from methods.teal import Teal


def evaluate(lm, tasks, limit):
    start = time.perf_counter()
    simple_evaluate(
        model=lm,
        tasks=load_tasks(tasks),
        task_manager=task_manager(),
        limit=limit,
        bootstrap_iters=100,
        log_samples=True,
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench/overhead.json"))
    parser.add_argument("--tasks", default="piqa,arc_easy,lambada_openai")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = args.tasks.split(",")
    folder = embedded_model_dir()
    dtype = getattr(torch, pick_dtype("auto", "cpu"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    view = view_of(model)
    method = Teal(0.5)
    state = method.fit(view, Calibration(view, token_windows(tokenizer, calibration_text(), 512, count=4).split(4)))
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu")
    ours = HarnessLM(view, tokenizer, batch_size=8)
    times: dict[str, list[float]] = {"plain lm-eval, dense": [], "harness, dense": [], "harness, TEAL 0.5 masked": []}
    for round_ in range(args.rounds + 1):
        once = [evaluate(plain, tasks, args.limit), evaluate(ours, tasks, args.limit)]
        with attached(view, [(method, state)], Policy(), count=True):
            once.append(evaluate(ours, tasks, args.limit))
        if round_:  # the first round warms up
            for name, seconds in zip(times, once, strict=True):
                times[name].append(seconds)
    base = times["plain lm-eval, dense"]
    ratios = {name: ratio(seconds, base) for name, seconds in times.items()}
    result = {
        "what": "wall time over plain lm-eval (HFLM, dense), median of paired rounds; goal for TEAL: at most 1.25",
        "tasks": tasks,
        "limit": args.limit,
        "batch_size": 8,
        "dtype": str(dtype),
        "seconds": times,
        "ratio": ratios,
        "environment": where(),
    }
    write(args.out, result)
    for name, seconds in times.items():
        print(f"{name:28s} {statistics.median(seconds):7.1f} s  {ratios[name]:5.2f}x plain")


if __name__ == "__main__":
    main()
