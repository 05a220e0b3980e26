"""One decode step on a CPU, by engine and by weight format, beside llama.cpp.

    python -m bench.cpu_step --out results/bench/cpu_step.json
    python -m bench.cpu_step --model qwen2.5-coder-0.5b --bits 4 --threads 1 --out results/bench/cpu_step_0.5b.json

An embedded model after a real prompt: Hugging Face eager, our kernels in the eager module, the fused step in bf16 and
in int8 and int4 (a scale for 32 weights: 4.5 bits a weight where lines need no padding), head included, dense and with
TEAL; and llama.cpp, where llama-cpp-python is installed (extra `peers`), on the model's own GGUF file and on the same
weights in Q4_0 (bench/peers.py). Every fused step is compared with the masked module before it is timed.

In each round every variant and one plain read of a large buffer take their turn; ratios are paired by round, figures
are medians. With one thread the clock is the thread's CPU time, which a shared machine disturbs less. With more it is
the wall's, so that waiting counts, and each variant also takes its turn with one thread: `over one thread`.

A step's bytes are those of the lines that it must read (padding included), the head's and the KV cache's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

from bench.peers import Peer, peers
from bench.record import where, write
from bench.rounds import in_turn, ratio
from harness.data import assets, embedded
from harness.data.text import calibration_text, evaluation_text, token_windows
from harness.execution.attach import Fitted
from harness.execution.fused_check import check_fused
from harness.execution.fused_cpu import FusedStep, fused_decode, packed_weights
from harness.execution.kernel import kernel_execution
from harness.execution.layouts import own_gemv
from harness.fitting.calibration import Calibration
from harness.model.families import view_of
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.sparsity import measure as sparsity_rows
from kernels.cpu import instruction_set, stream
from methods.teal import Teal

CONTEXT, STEPS = 128, 33
BUFFER = 2**28  # bytes of the plain read, more than any cache holds
HF = "HF eager dense"


@dataclass
class Variant:
    """A way to run the step. bytes: what it must read; bits: of a weight as it is stored."""

    name: str
    attach: Callable[[], AbstractContextManager[Any]]
    bytes: float
    bits: float


@dataclass
class Subject:
    """What is timed: the model, the method, the prompt [1, tokens], and the share of block weights that is skipped."""

    view: View
    teal: Fitted
    prompt: Tensor
    skipped: float


Clock = Callable[[], float]
Runs = dict[str, Callable[[], float]]  # name -> median seconds of a step


# ----------------------------------------------------------------------------------------------------- what is timed


def subject(args: argparse.Namespace) -> Subject:
    folder = embedded.embedded_dir(args.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    view = view_of(model, name=args.model)
    method = Teal(args.sparsity)
    windows = token_windows(tokenizer, evaluation_text(), 512, count=1, what="perplexity")
    calibration = Calibration(view, token_windows(tokenizer, calibration_text(), 512, count=4).split(4))
    teal: Fitted = [(method, method.fit(view, calibration))]
    skipped = next(
        r["value"]
        for r in sparsity_rows(view, teal, Policy(), windows)
        if (r["metric"], r["site"], r["step_phase"], r["layer"]) == ("achieved", "model", "decode", None)
    )
    return Subject(view, teal, windows[:1, :CONTEXT], skipped)


def native_bytes(view: View, skipped: float) -> float:
    blocks = view.block_weights * view.n_layers * (1 - skipped)
    return view.dtype.itemsize * (blocks + view.model.get_output_embeddings().weight.numel()) + cache_bytes(view)


def cache_bytes(view: View) -> float:
    entries = CONTEXT + STEPS / 2
    return 2 * view.dtype.itemsize * entries * view.n_kv_heads * view.head_dim * view.n_layers


def packed_bytes(view: View, packed: Any, skipped: float) -> float:
    blocks = sum(p.codes.nbytes for (layer, _), p in packed.items() if layer >= 0)
    return blocks * (1 - skipped) + packed[-1, "head"].codes.nbytes + cache_bytes(view)


def variants_of(own: Subject, widths: list[int]) -> tuple[list[Variant], dict[str, str]]:
    """All that are timed, checked before; and what the checks found."""
    view, teal, policy, checks = own.view, own.teal, Policy(), {}
    weights = view.block_weights * view.n_layers + view.model.get_output_embeddings().weight.numel()

    def fused(name: str, methods: Fitted, packed: Any = None) -> Variant:
        found = check_fused(view, methods, policy, own.prompt[:, :64], packed)
        checks[name] = f"parts within {found.part:.1e}, logits within {found.logits:.1e}"
        share = own.skipped if methods else 0.0
        if packed is None:
            return Variant(name, lambda: fused_decode(view, methods, policy), native_bytes(view, share), native)
        size, bits = packed_bytes(view, packed, share), 8 * sum(p.codes.nbytes for p in packed.values()) / weights
        return Variant(name, lambda: fused_decode(view, methods, policy, packed), size, bits)

    native = 8 * view.dtype.itemsize
    variants = [
        Variant(HF, nullcontext, native_bytes(view, 0), native),
        Variant("own kernels, eager, dense", lambda: own_gemv(view), native_bytes(view, 0), native),
        Variant(
            "own kernels, eager, TEAL",
            lambda: kernel_execution(view, teal, policy),
            native_bytes(view, own.skipped),
            native,
        ),
        fused("fused dense", ()),
        fused("fused TEAL", teal),
    ]
    for bits in widths:
        packed = packed_weights(view, bits)
        variants += [fused(f"fused int{bits} dense", (), packed), fused(f"fused int{bits} TEAL", teal, packed)]
    return variants, checks


def decode(own: Subject, variant: Variant, now: Clock, helped: list[bool]) -> float:
    """Median seconds of a step after the prompt. helped: whether threads helped at the end is added."""
    model = own.view.model
    with torch.no_grad(), variant.attach() as attached:
        cache = StaticCache(config=model.config, max_cache_len=CONTEXT + STEPS)
        token = model(own.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
        times = []
        for _ in range(STEPS):
            start = now()
            out = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            times.append(now() - start)
        if isinstance(attached, FusedStep):
            helped.append(attached.step.helped)
    return statistics.median(times)


# ------------------------------------------------------------------------------------------------------------ rounds


def timed(runs: Runs, rounds: int, now: Clock) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of a step by name and round, and bytes a second of a plain read in each."""
    buffer = torch.ones(BUFFER // 4)

    def read() -> float:
        start = now()
        stream(buffer)
        return now() - start

    times = in_turn({**runs, "read": read}, rounds)
    return times, [buffer.nbytes / seconds for seconds in times.pop("read")]


def with_threads(number: int, run: Callable[[], float], peer: Peer | None = None) -> Callable[[], float]:
    """The run with so many threads, of ours or of the peer."""

    def once() -> float:
        torch.set_num_threads(1 if peer is not None else number)
        if peer is not None:
            peer.threads(number)
        return run()

    return once


def steps(args: argparse.Namespace, own: Subject, variants: list[Variant], others: list[Peer], threads: int) -> Any:
    """Everything with one thread, or what is made for several with as many and with one."""
    now = time.thread_time if threads == 1 else time.perf_counter
    prompt = own.prompt.flatten().tolist()
    helped: dict[str, list[bool]] = {v.name: [] for v in variants}
    kept = [v for v in variants if threads == 1 or v.name.startswith("fused")]
    alone: Runs = {v.name: partial(decode, own, v, now, helped[v.name]) for v in kept}
    alone |= {p.name: partial(p.step, prompt, STEPS, now) for p in others}
    by_name = {p.name: p for p in others}
    runs: Runs = {}
    for name, run in alone.items():
        runs[name] = with_threads(threads, run, by_name.get(name))
        if threads > 1:
            runs[f"{name}, one thread"] = with_threads(1, run, by_name.get(name))
    times, bandwidth = timed(runs, args.rounds, now)
    torch.set_num_threads(1)
    sizes = {v.name: (v.bytes, v.bits) for v in kept}
    sizes |= {p.name: (p.bytes + cache_bytes(own.view), p.bits) for p in others}
    rows = []
    for name, (size, bits) in sizes.items():
        rows.append(row_of(name, size, bits, times, bandwidth, [p.name for p in others]))
        if threads > 1 and helped.get(name):
            rows[-1]["helped"] = round(sum(helped[name][::2]) / len(helped[name][::2]), 2)
        print(rows[-1], flush=True)
    facts = {"threads": threads, "read_bytes_per_s": round(statistics.median(bandwidth))}
    return facts | {"clock": "thread CPU" if threads == 1 else "wall", "rows": rows}


def row_of(
    name: str, size: float, bits: float, times: dict[str, list[float]], bandwidth: list[float], others: list[str]
) -> dict[str, Any]:
    """One variant's figures. `over X`: X's time over this one's, so above 1 this one is faster."""
    seconds = times[name]
    row = {
        "variant": name,
        "tokens_per_second": round(1 / statistics.median(seconds), 1),
        "milliseconds": round(1e3 * statistics.median(seconds), 3),
        "megabytes": round(size / 1e6, 1),
        "bits_a_weight": round(bits, 2),
        "roofline_share": ratio([size / b for b in bandwidth], seconds),
    }
    baselines = dict.fromkeys([HF, name.replace("TEAL", "dense"), *others])
    row |= {f"over {base}": ratio(times[base], seconds) for base in baselines if base in times}
    if f"{name}, one thread" in times:
        row["over one thread"] = ratio(times[f"{name}, one thread"], seconds)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default=assets.EMBEDDED_MODEL, choices=[assets.EMBEDDED_MODEL, *embedded.MODELS])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--bits", nargs="*", type=int, default=[8, 4], choices=[8, 4], help="low-bit formats")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="numbers of threads to time steps with")
    parser.add_argument("--scratch", type=Path, default=assets.cache_dir() / "bench")
    args = parser.parse_args()
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    result: dict[str, Any] = {"environment": where(), "instruction_set": instruction_set(), "model": args.model}
    own = subject(args)
    variants, checks = variants_of(own, args.bits)
    result |= {"dtype": args.dtype, "method": "teal", "skipped": round(own.skipped, 4), "checks": checks}
    with peers(args.model, args.scratch, 2 * CONTEXT) as others:
        result["steps"] = [steps(args, own, variants, others, threads) for threads in args.threads]
    result["load_average"] = [round(load, 2), round(os.getloadavg()[0], 2)]
    if args.out:
        write(args.out, result)


if __name__ == "__main__":
    main()
