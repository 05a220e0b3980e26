"""Latency probe: time to first token and time per token of the patched Hugging Face module, beside the dense one.

Every round times every variant once, so that drift hits all of them, each round in another order; the first round is
warm-up and dropped. Kernels are compared with masked execution before anything is timed, and where none ran, nothing
is called kernel execution. Masked execution is timed only to show what it costs: it skips no bytes, and no figure draws
a speed-up from it.

Rows say by which engine a step ran:
    eager: the module, launched operation by operation.
    graph: a CUDA graph of the step, fused where the model allows it; fused attention takes batches too. What decides
        anew for each token runs in the module's own projections, between fused norms and attention (`frame`).
    chained: a CUDA graph of seven launches a block (nine where a copy in few bits chooses the neurons), each begun
        before the one before it ends, on a GPU of capability 9 or more, at batch 1, in 16 bits; its library baseline is
        the module's graph.
    fused: the whole step as one C++ operator, on a CPU at batch 1; its library baseline is the eager module.
    compiled: torch.compile of the step (on a CPU, with `compile`), under an execution of its own (`dense_compiled`,
        `kernel_compiled`), compared with compiled dense only.
The dense variants depend on the model and the machine alone, never on the method, and `time_ratio` is always to the
fastest of them. A method at which the host waits for the device can't be captured, so on a GPU it is eager beside a
dense graph, and its row says why: `time_ratio_engine` compares it with the fastest dense run of its own engine.

Above batch 1 a step reads each channel that any of its sequences keeps: `union_touched` says how much that is, counted
over the masks of the same prompts. Kernels take batches of up to 16 where thresholds decide. Where they take only some
of a method's projections, its rows are masked and say which.

Of quantised weights only steps that read them are timed; where there is none, a row says so.

variants: what is timed. low_bit: the variants of quantised weights. plans: which variants a method gets otherwise;
cpu_step, chained, batched: those of whole fused steps. energy: joules, where the device counts them.
timing: rounds, and the clock. watch: who else was at work meanwhile, and peak memory. reads: what a step must read.
rows: what is told of it.
"""

from collections.abc import Mapping
from typing import Any

from harness.execution.attach import attached
from harness.model.logits import watched_logits
from harness.probes.bench import Bench
from harness.probes.latency import low_bit
from harness.probes.latency.plans import variants
from harness.probes.latency.rows import measure
from harness.probes.latency.variants import Row
from harness.results.limited import limited, marked

__all__ = ["measure", "run", "variants"]

LIKELY = 0.5  # share to tune kernels for, where an error budget or trained routers settle it
TIMED = True
SHAPES = True
WINDOWS = 4  # of the held-out text: what prompts are cut from


def windows(probe: Mapping[str, Any]) -> int:
    """Of held-out text."""
    return WINDOWS


def run(bench: Bench) -> None:
    """Check the kernels, then time every variant."""

    def make() -> tuple[list[Row]]:
        view, settings, windows = bench.view, bench.config["probe"]["latency"], bench.windows(WINDOWS).tokens
        with attached(view, bench.fitted, bench.policy), watched_logits(view, "the prompts that are timed"):
            view.model(windows[:1].to(view.device), use_cache=False, logits_to_keep=1)
        asked = bench.config["sparsity"]
        if view.stored is not None:
            if sentence := low_bit.no_step(view, bench.fitted):
                bench.note(sentence)
                return ([{"metric": "tpot_median", "status": "unsupported", "message": sentence}],)
            plan = low_bit.variants(view, bench.fitted, bench.policy, windows)
        else:
            plan = variants(view, bench.fitted, bench.policy, LIKELY if asked is None else asked, settings, windows)
        return (marked(measure(view, plan, windows, settings), limited(settings["repeats"], "rounds")),)

    bench.commit("latency", make)
