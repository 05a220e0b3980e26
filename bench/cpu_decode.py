"""End-to-end decode of the embedded model on a CPU: TEAL at 0.5 through the kernels, beside its baselines.

The rows are the latency probe's, eager and compiled variants interleaved; compiling takes minutes.
Run: python -m bench.cpu_decode --out results/bench/cpu_decode.json
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.record import where, write
from harness.data.assets import embedded_model_dir
from harness.data.text import calibration_text, evaluation_text, token_windows
from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.step import Policy
from harness.probes import latency
from methods.teal import Teal

CONFIG = {"execution": "kernel", "batch": [1], "context": [128], "new_tokens": 17, "repeats": 8, "min_seconds": 3.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench/cpu_decode.json"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = CONFIG | {"compile": not args.no_compile}
    folder = embedded_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    view = view_of(model, name="smollm2-135m")
    method = Teal(args.sparsity)
    state = method.fit(view, Calibration(view, token_windows(tokenizer, calibration_text(), 512, count=8).split(4)))
    windows = token_windows(tokenizer, evaluation_text(), 512, count=4, what="perplexity")
    fitted, load = [(method, state)], os.getloadavg()
    variants = latency.variants(view, fitted, Policy(), args.sparsity, config, windows)
    result = {
        "what": "batch 1 decode of the Hugging Face module; ratios paired by round, medians",
        "threads": args.threads,
        "model": "smollm2-135m",
        "method": "teal",
        "sparsity": args.sparsity,
        "dtype": args.dtype,
        "environment": where(),
        "load_average_before": [round(value, 2) for value in load],
        "rows": latency.measure(view, variants, windows, config),
        "load_average_after": [round(value, 2) for value in os.getloadavg()],
    }
    write(args.out, result)
    for row in result["rows"]:
        if row["metric"] == "tpot_median" or row["metric"].startswith("time_ratio"):
            label = f"{row['execution']} {row.get('variant') or ''} {row.get('sparsity_requested', '')}"
            print(f"{label:32s} {row['metric']:20s} {row['value']:.4f} {row['unit']}")


if __name__ == "__main__":
    main()
