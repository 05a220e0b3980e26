"""End-to-end decode of the embedded model on a CPU: TEAL at 0.5 through the kernels, beside its baselines.

Eager variants run in the latency probe; compiled ones need a copy of the model each (60 to 100 s to compile), and all
compiled steps are interleaved. Run: python -m bench.cpu_decode --out results/bench/cpu_decode.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from harness.assets import embedded_model_dir
from harness.calibration import Calibration
from harness.environment import environment
from harness.execute import own_gemv
from harness.families import view_of
from harness.probes import latency
from harness.step import Policy
from harness.text import calibration_text, evaluation_text, token_windows
from methods.teal import Teal

CONFIG = {"batch": [1], "context": [128], "new_tokens": 17, "repeats": 8, "min_seconds": 3.0}


def eager(view, fitted, windows, sparsity):
    """Rows of the latency probe."""
    variants = latency.variants(view, fitted, Policy(), sparsity, "kernel", windows)
    return latency.measure(view, variants, windows, CONFIG)


def compiled(model, limits, prompt, steps: int = 16, rounds: int = 8):
    """Median seconds a token of compiled steps, and their ratios to eager dense, paired by round."""
    runs = {}
    with ExitStack() as stack, torch.no_grad():
        for name in ("eager dense", "compiled dense", "compiled kernel 0 %", "compiled kernel"):
            own = view_of(copy.deepcopy(model))
            if "kernel" in name:
                stack.enter_context(own_gemv(own, limits={} if "0 %" in name else limits))
            forward = own.model.forward if name == "eager dense" else torch.compile(own.model.forward, dynamic=False)
            runs[name] = (own.model, forward, [])
        for round_ in range(rounds + 2):
            for own, forward, times in runs.values():
                cache = StaticCache(config=own.config, max_cache_len=256)
                token = own(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
                seconds = []
                for _ in range(steps):
                    start = time.perf_counter()
                    token = forward(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
                    seconds.append(time.perf_counter() - start)
                if round_ > 1:  # compiled, then warm
                    times.append(statistics.median(seconds))
    base = runs["eager dense"][2]
    return {
        name: {
            "seconds_per_token": statistics.median(times),
            "over_eager_dense": statistics.median(b / t for b, t in zip(base, times, strict=True)),
        }
        for name, (_, _, times) in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench/cpu_decode.json"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = embedded_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    view = view_of(model, name="smollm2-135m")
    method = Teal(args.sparsity)
    state = method.fit(view, Calibration(view, token_windows(tokenizer, calibration_text(), 512, count=8).split(4)))
    windows = token_windows(tokenizer, evaluation_text(), 512, count=4, what="perplexity")
    result = {
        "what": "batch 1 decode of the Hugging Face module, one thread; ratios paired by round, medians",
        "model": "smollm2-135m",
        "method": "teal",
        "sparsity": args.sparsity,
        "dtype": args.dtype,
        "environment": environment(),
        "rows": eager(view, [(method, state)], windows, args.sparsity),
    }
    if not args.no_compile:
        limits = latency.static_thresholds(view, [(method, state)])
        result["compiled"] = compiled(model, limits, windows[:1, :128])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2, default=str) + "\n")
    for row in result["rows"]:
        if row["metric"] in ("tpot_median", "time_ratio", "time_ratio_library"):
            label = f"{row['execution']} {row.get('variant') or ''} {row.get('sparsity_requested', '')}"
            print(f"{label:30s} {row['metric']:20s} {row['value']:.4f} {row['unit']}")
    for name, facts in result.get("compiled", {}).items():
        print(f"{name:30s} {facts['seconds_per_token']:.4f} s  {facts['over_eager_dense']:.2f}x eager dense")


if __name__ == "__main__":
    main()
