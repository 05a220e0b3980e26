"""Latency probe: time to first token and time per token of the patched Hugging Face module, beside the dense one.

Every round times every variant once, so that drift hits all of them; the first round is warm-up and dropped. Kernels
are compared with masked execution before anything is timed. Masked execution is timed only to show what it costs: it
skips no bytes, and no figure draws a speed-up from it.

Above batch 1 a step reads each channel that any of its sequences keeps: `union_touched` says how much that is, counted
over the masks of the same prompts. Kernels take batches of up to 16 where thresholds decide. Where they take only some
of a method's projections, its rows are masked and say which.

On a GPU the step is a CUDA graph where it can be. On a CPU it is the eager module; with `compile` a torch.compile of
the step is timed beside it, under an execution of its own (`dense_compiled`, `kernel_compiled`), whose baselines are
compiled too.
"""

from __future__ import annotations

import copy
import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import StaticCache

import kernels
from harness.execution.attach import Fitted, attached
from harness.execution.fused_step import DecodeLoop, Linear, ThresholdOf, fast_decode, unfit
from harness.execution.kernel import Check, check_kernels, has_kernels, kernel_execution, own_gemv, sliced
from harness.execution.method import Method
from harness.model.families import view_of
from harness.model.sees import OUTPUT
from harness.model.selection import PROJECTIONS, Thresholds
from harness.model.step import Policy, Step
from harness.model.view import View
from harness.probes.bench import Bench
from harness.probes.sparsity import measure as sparsity_rows

Row = dict[str, Any]
WINDOWS = 4  # of the held-out text: what prompts are cut from
NO_BATCH = "no kernel above batch 1 on this machine"


@dataclass
class Variant:
    """One way to run the step.

    attach: a context in which the view's model decodes that way. columns: row columns that set this variant apart from
    the others of the cell. touched: share of the block weights that a step reads. graph: capture the step (GPU).
    unbatched: what keeps it masked above batch 1, in words; None where kernels take batches of up to 16. union: of
    a prompt [batch, context], the share of the block weights that a step after it reads, and the tokens counted.
    decoder: a model of this variant's own whose step is compiled; None decodes the view's, eagerly.
    """

    execution: str  # dense, masked, kernel or dense_slice; dense_compiled or kernel_compiled
    attach: Callable[[], AbstractContextManager[Any]] = nullcontext
    columns: Row = field(default_factory=dict)
    touched: float = 1.0
    cache: float = 1.0  # share of the KV cache that a step reads for sure
    above: Callable[[], AbstractContextManager[Any]] | None = None  # attach above batch 1, where that is another one
    unbatched: str | None = "no kernel above batch 1"
    union: Callable[[Tensor], tuple[float, int]] | None = None
    graph: bool = False
    decoder: nn.Module | None = None
    held: ExitStack = field(default_factory=ExitStack)  # what the decoder's forwards live in
    step: Callable[..., Any] | None = None  # the decoder's compiled forward, for the shapes of one grid point
    first: list[float] = field(default_factory=list)  # seconds to the first token, one a round
    each: list[float] = field(default_factory=list)  # seconds a decode step, over all rounds
    rounds: list[float] = field(default_factory=list)  # median step of each round, in the order of the rounds


def run(bench: Bench) -> None:
    """Check the kernels, then time every variant."""

    def make() -> tuple[list[Row]]:
        view, settings, windows = bench.view, bench.config["probe"]["latency"], bench.windows(WINDOWS)
        found = variants(view, bench.fitted, bench.policy, bench.config["sparsity"], settings, windows)
        return (measure(view, found, windows, settings),)

    bench.commit("latency", make)


def variants(
    view: View, methods: Fitted, policy: Policy, sparsity: float, config: Mapping[str, Any], windows: Tensor
) -> list[Variant]:
    """Dense first, then (for a method) its fair baselines, itself, and the ideal slice. Kernels are checked before.

    With kernels: the library's dense, the tuned dense GEMV, the method's own kernel layout at 0 %, the method, and a
    dense slice of the requested size. config: `execution` (auto, kernel or masked) and `compile` (also the compiled
    step, on a CPU). Raises `KernelMismatchError` where kernels and masks disagree.
    """
    execution = config["execution"]
    graph = view.device.type == "cuda"
    compiles = config["compile"] and not graph
    found = [Variant("dense", graph=False)]
    if not any(method.sites for method, _ in methods):
        return found + (compiled(view, None, {}, 1.0) if compiles else [])
    possible = "kernels" not in view.limits and any(has_kernels(m) for m, _ in methods)
    if execution == "masked" or (execution == "auto" and not possible):
        why = {"message": view.limits["kernels"]} if "kernels" in view.limits else no_kernel(methods)
        return [*found, Variant("masked", lambda: attached(view, methods, policy), why)]
    error = check_kernels(view, methods, windows[:1, :64].to(view.device)).error
    batch = check_kernels(view, methods, prompts(windows, 2, 64).to(view.device))
    counted = sparsity_rows(view, methods, policy, windows[:1])
    share = next(
        r["value"]
        for r in counted
        if (r["metric"], r["site"], r["step_phase"], r["layer"]) == ("achieved", "model", "decode", None)
    )
    checked = {"message": f"kernel equals masked within {max(error, batch.error):.1e}"}
    nothing = None if kernels.batch_path(torch.zeros(2, 1, dtype=view.dtype, device=view.device)) else NO_BATCH
    unbatched = nothing or left_masked(batch)
    union = None if unbatched else partial(union_touched, view, methods, policy, batch.kernels)
    thresholds = static_thresholds(view, methods)
    if graph and unfit(view) is None and thresholds is not None:

        def fast(linear: Linear, cut: ThresholdOf | None = None) -> Callable[[], AbstractContextManager[Any]]:
            return lambda: fast_decode(view, linear, cut, expected_sparsity=sparsity)

        return [
            Variant("dense", fast("library"), graph=True),
            Variant("dense", fast("rows"), {"variant": "tuned GEMV"}, graph=True),
            Variant(
                "kernel", fast("columns"), {"sparsity_requested": 0.0}, graph=True,
                above=lambda: own_gemv(view, limits={}), unbatched=nothing,
            ),
            Variant(
                "kernel", fast("columns", thresholds), checked, 1 - share, graph=True,
                above=lambda: own_gemv(view, thresholds), unbatched=unbatched, union=union,
            ),
        ]  # fmt: skip
    cache = 0.0 if any(method.own_kernels for method, _ in methods) else 1.0  # how much of it is skipped is not counted
    found += [
        Variant("dense", lambda: own_gemv(view), {"variant": "tuned GEMV"}),
        Variant("kernel", lambda: own_gemv(view, limits={}), {"sparsity_requested": 0.0}, unbatched=nothing),
        Variant(
            "kernel", lambda: kernel_execution(view, methods, policy), checked, 1 - share, cache,
            unbatched=unbatched, union=union,
        ),
        Variant("dense_slice", lambda: sliced(view, sparsity), {}, 1 - sparsity),
    ]  # fmt: skip
    if compiles and thresholds is None:
        checked["message"] += "; not compiled: the method decides more at run time than fixed thresholds"
    elif compiles:
        found += compiled(view, thresholds, checked, 1 - share)
    return found


def left_masked(check: Check) -> str | None:
    """Which projections kernels leave masked in a batch, in words, or None."""
    if not check.masked:
        return None
    kept = f"; only {', '.join(sorted(check.kernels))} skip in a batch" if check.kernels else ""
    return f"no kernel for a batch of {', '.join(sorted(check.masked))}{kept}"


@torch.no_grad()
def union_touched(
    view: View, methods: Fitted, policy: Policy, projections: frozenset[str], prompt: Tensor, steps: int = 4
) -> tuple[float, int]:
    """Share of the block weights that a step of the batch touches, a mean over decode steps, and tokens counted.

    In `projections` that is every channel that any sequence keeps, elsewhere all. Counted in masked execution of the
    prompt [batch, context] and greedy steps after it: what a mask leaves at zero is dropped.
    """
    dropped: list[Tensor] = []

    def see(module: nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> None:
        x = args[0]
        dropped.append((x.reshape(-1, x.shape[-1]) == 0).all(0).sum() * module.out_features)

    with attached(view, methods, policy), ExitStack() as stack:
        out = view.model(prompt, use_cache=True, logits_to_keep=1)
        for block in view.blocks:
            for name, module in block.projections():
                if name in projections:
                    stack.callback(module.register_forward_hook(see).remove)
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            out = view.model(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    total = steps * view.block_weights * view.n_layers
    return 1 - int(sum(dropped)) / total, steps * len(prompt)


def no_kernel(methods: Fitted) -> Row:
    """The columns of masked execution: which methods leave no choice, and why."""
    said = [
        f"{method.name} has no kernel"
        + (": it decides from outputs, when the work is done" if OUTPUT in method.sites.values() else "")
        for method, _ in methods
        if method.sites and not has_kernels(method)
    ]
    return {"message": "; ".join(said)} if said else {}


def compiled(view: View, thresholds: ThresholdOf | None, columns: Row, touched: float) -> list[Variant]:
    """The compiled twins: the library's dense, and with thresholds the tuned GEMV, the kernel at 0 % and the method.

    The model is copied twice: as it is, and with transposed weights, which the last three share.
    """
    found = [Variant("dense_compiled", decoder=copy.deepcopy(view.model))]
    if thresholds is None:
        return found
    model = copy.deepcopy(view.model)
    for execution, limits, own, share in (
        ("dense_compiled", None, {"variant": "tuned GEMV"}, 1.0),
        ("kernel_compiled", {}, {"sparsity_requested": 0.0}, 1.0),
        ("kernel_compiled", thresholds, columns, touched),
    ):
        shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
        variant = Variant(execution, columns=own, touched=share, decoder=copy.deepcopy(model, shared))
        variant.held.enter_context(own_gemv(view_of(variant.decoder), limits=limits))
        found.append(variant)
        model = variant.decoder  # its weights are transposed by now
    return found


@torch.no_grad()
def measure(view: View, found: Sequence[Variant], windows: Tensor, config: dict[str, Any]) -> list[Row]:
    """Rows over the batch x context grid. windows: int64 [n, length], real text that prompts are cut from."""
    rows: list[Row] = []
    bandwidth = kernels.read_bandwidth(view.device)
    for batch in config["batch"]:
        for context in config["context"]:
            prompt = prompts(windows, batch, context).to(view.device)
            # Compiled at batch 1 only: each shape of each variant takes a minute or more.
            timed = [variant for variant in found if variant.decoder is None or batch == 1]
            for variant in timed:
                variant.first, variant.each, variant.rounds = [], [], []
            compile_steps(view, timed, prompt, config["new_tokens"])
            said = disturbance(view.device)
            interleave(view, timed, prompt, config["new_tokens"], config["repeats"], config["min_seconds"])
            for variant in timed:
                # The strongest dense run is the baseline, so that a better GEMV is never sold as sparsity; eager is
                # compared with eager, compiled with compiled.
                dense = [v for v in timed if v.execution == ("dense_compiled" if variant.decoder else "dense")]
                strongest = min(dense, key=lambda v: statistics.median(v.each))
                union = variant.union(prompt) if variant.union is not None and batch <= kernels.MAX_ROWS else None
                rows += rows_of(view, variant, strongest, batch, context, said, bandwidth, union)
                over = {"time_ratio_library": dense[0]} | ({"time_ratio_eager": found[0]} if variant.decoder else {})
                for metric, baseline in over.items():
                    rows.append(rows[-1] | {"metric": metric, "value": ratio(baseline, variant), "unit": "ratio"})
    rows.append(
        {
            "probe": "latency",
            "metric": "read_bandwidth",
            "value": bandwidth,
            "unit": "bytes/s",
            "n": 1,
            "execution": "dense",
        }
    )
    return rows


def compile_steps(view: View, found: Sequence[Variant], prompt: Tensor, new_tokens: int) -> None:
    """Compile the steps of the variants that want it for the shapes of one grid point, 60 to 100 s each."""
    own = [variant for variant in found if variant.decoder is not None]
    if own:
        torch.compiler.reset()  # of all shapes of all variants together, torch would keep eight
    for variant in own:
        assert variant.decoder is not None
        variant.step = torch.compile(variant.decoder.forward, dynamic=False, fullgraph=True)
        generate(view, prompt, new_tokens, variant)


def prompts(windows: Tensor, batch: int, context: int) -> Tensor:
    """int64 [batch, context] cut from running text; each row another place of it."""
    stream = windows.flatten()
    starts = [row * max(1, (len(stream) - context) // max(1, batch)) for row in range(batch)]
    repeats = -(-context // len(stream))
    stream = stream.repeat(repeats + 1) if repeats > 1 else stream
    return torch.stack([stream[start : start + context] for start in starts])


def interleave(
    view: View, found: Sequence[Variant], prompt: Tensor, new_tokens: int, repeats: int, min_seconds: float
) -> None:
    """Round after round until every variant has `repeats` rounds and `min_seconds` of decode time."""
    done, spent = -1, 0.0  # the first round is warm-up
    collecting = gc.isenabled()
    gc.disable()
    try:
        while done < repeats or spent / len(found) < min_seconds:
            for variant in found:
                with (variant.attach if len(prompt) == 1 else variant.above or variant.attach)():
                    first, steps = generate(view, prompt, new_tokens, variant)
                if done >= 0:
                    variant.first.append(first)
                    variant.each += steps
                    variant.rounds.append(statistics.median(steps))
                    spent += sum(steps)
            done += 1
    finally:
        if collecting:
            gc.enable()


def generate(view: View, prompt: Tensor, new_tokens: int, variant: Variant) -> tuple[float, list[float]]:
    """Greedy decode with a static cache: seconds to the first token, and of each of the new_tokens - 1 steps after."""
    model = variant.decoder or view.model
    step = variant.step or model
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
    start = now(prompt.device)
    token = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    last = now(prompt.device)
    first, steps = last - start, []
    loop = DecodeLoop(view, cache, token) if variant.graph else None  # captured outside of the timed steps
    last = now(prompt.device)
    for _ in range(new_tokens - 1):
        if loop is not None:
            loop.step()
        else:
            out = step(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        moment = now(prompt.device)
        steps.append(moment - last)
        last = moment
    return first, steps


def now(device: torch.device) -> float:
    """Seconds, with the device's queue empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def disturbance(device: torch.device) -> str | None:
    """Who else is at work on this machine, in a few words, or None."""
    if device.type == "cuda":
        this = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        listed = subprocess.run(
            ["nvidia-smi", "-i", this, "--query-compute-apps=pid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
        others = {int(pid) for pid in listed.stdout.split() if pid.isdigit()} - {os.getpid()}
        return f"{len(others)} other processes on the GPU" if others else None
    load = other_load()
    return f"other processes took {load:.1f} cores" if load > 0.3 else None


def other_load() -> float:
    """CPU share that other processes take at the moment, in cores."""
    own = psutil.Process()
    before, start = sum(own.cpu_times()[:2]), time.perf_counter()
    total = psutil.cpu_percent(interval=0.2) / 100 * (psutil.cpu_count() or 1)
    mine = (sum(own.cpu_times()[:2]) - before) / (time.perf_counter() - start)
    return max(0.0, total - mine)


def step_bytes(view: View, touched: float, batch: int, context: int, cached: float = 1.0) -> float:
    """Bytes that one decode step must read: kept block weights, the head, and the KV cache (a share `cached` of it)."""
    size = view.dtype.itemsize
    head = view.model.get_output_embeddings().weight.numel()
    cache = cached * 2 * batch * context * view.n_kv_heads * view.head_dim * view.n_layers
    return size * (touched * view.block_weights * view.n_layers + head + cache)


def rows_of(
    view: View,
    variant: Variant,
    baseline: Variant,
    batch: int,
    context: int,
    said: str | None,
    bandwidth: float,
    union: tuple[float, int] | None = None,
) -> list[Row]:
    """Medians, the 90th percentile, spread, throughput, roofline and the paired ratio to the baseline, a fact a row.

    said: who disturbed the run. bandwidth: bytes/s read by this device in the same run. union: of `Variant.union`.
    """
    common: Row = {"probe": "latency", "execution": variant.execution, "batch": batch, "context": context}
    common |= {"step_phase": "decode"} | variant.columns
    notes = [variant.columns.get("message"), said]
    touched, cache = variant.touched, variant.cache
    if batch > 1 and variant.execution in ("kernel", "dense_slice"):
        touched = 1.0 if union is None else union[0]
        too_many = f"no kernel above batch {kernels.MAX_ROWS}" if batch > kernels.MAX_ROWS else None
        unbatched = variant.unbatched or too_many
        if unbatched is not None:
            cache, common["execution"] = 1.0, "masked"
            notes.append(f"{unbatched}: masked, the library's matmul on the transposed weight")
    common["message"] = "; ".join(note for note in notes if note) or None
    median = statistics.median(variant.each)
    p90 = sorted(variant.each)[int(0.9 * (len(variant.each) - 1))]
    n, rounds = len(variant.each), len(variant.rounds)
    spread = statistics.stdev(variant.rounds) if rounds > 1 else None
    needed = step_bytes(view, touched, batch, context, cache)
    if view.device.type == "cuda":
        memory, what = torch.cuda.max_memory_allocated(view.device), "peak_memory"
    else:
        memory, what = psutil.Process().memory_info().rss, "resident_memory"
    facts: list[tuple[str, float, str, int]] = [
        ("tpot_p90", p90, "s", n),
        ("tokens_per_second", batch / median, "tokens/s", n),
        ("time_ratio", ratio(baseline, variant), "ratio", rounds),
        ("step_bytes", needed, "bytes", 1),
        ("achieved_bandwidth", needed / median, "bytes/s", n),
        ("roofline_share", needed / median / bandwidth, "share", n),
        (what, float(memory), "bytes", 1),
    ]
    if union is not None:
        facts.insert(0, ("union_touched", union[0], "share", union[1]))
    each = {"metric": "tpot_median", "value": median, "unit": "s", "n": n, "stderr": spread}
    rest = [common | {"metric": m, "value": v, "unit": u, "n": k} for m, v, u, k in facts]
    if variant.decoder is not None:  # its prompt is eager and dense: nothing to report
        return [common | each, *rest]
    first = {"metric": "ttft_median", "value": statistics.median(variant.first), "unit": "s", "n": rounds}
    return [common | first | {"step_phase": "prefill"}, common | each, *rest]


def ratio(baseline: Variant, variant: Variant) -> float:
    """Median over rounds of baseline time over variant time, paired by round: above 1 is faster."""
    return statistics.median(theirs / ours for theirs, ours in zip(baseline.rounds, variant.rounds, strict=True))


def static_thresholds(view: View, methods: Fitted) -> ThresholdOf | None:
    """(projection, layer) -> threshold, where nested methods come to fixed thresholds at channel sites; else None."""
    found: dict[tuple[str, int], Tensor | float] = {}
    if len(methods) != 1:
        return None
    method, state = methods[0]
    if not has_kernels(method) or type(method).rewrite is not Method.rewrite:
        return None
    plan = method.plan(view, state)
    for site in method.sites:
        for layer in range(view.n_layers):
            for projection in PROJECTIONS.get(site, ()):
                if projection not in view.projection_names():
                    continue
                x = torch.zeros(1, 1, view.channels(projection), dtype=view.dtype, device=view.device)
                chosen = method.select(plan, site, layer, x, single_step(view.device))
                own = chosen.get(projection) if isinstance(chosen, Mapping) else chosen
                if not isinstance(own, Thresholds):
                    return None
                found[projection, layer] = own.t
        if site not in PROJECTIONS:
            return None
    return found


def single_step(device: torch.device) -> Step:
    """The step of one decode token, to ask a method what it decides."""
    yes = torch.ones(1, 1, dtype=torch.bool, device=device)
    return Step(valid=yes, decode=yes, position=yes.long(), sparse=None, past=1, input_ids=None)
