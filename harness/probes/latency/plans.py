"""Which variants are timed: the dense ones, the same for every method, and what the method can be run as."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from harness.execution.attach import Fitted, attached
from harness.execution.block_check import check_blocks
from harness.execution.capture import not_captured
from harness.execution.check import Check, KernelMismatchError, NoKernelRanError, check_kernels
from harness.execution.choice import Guesses
from harness.execution.frame import framed
from harness.execution.fused_cpu import hooked
from harness.execution.fused_step import Linear, ThresholdOf, fast_decode, no_frame, no_fused_step
from harness.execution.kernel import has_kernels, kernel_execution
from harness.execution.layouts import own_gemv, sliced
from harness.execution.method import Method, State
from harness.model.families import view_of
from harness.model.sees import OUTPUT
from harness.model.selection import PROJECTIONS, Thresholds
from harness.model.step import Policy, Step
from harness.model.view import View
from harness.probes.latency.batched import dense_batch, method_batch
from harness.probes.latency.chained import dense_chain, method_chain
from harness.probes.latency.cpu_step import check_dense_step, dense_step, method_step
from harness.probes.latency.reads import ideal_slice, union_read
from harness.probes.latency.timing import prompts
from harness.probes.latency.variants import Attach, Row, Variant, within
from harness.probes.sparsity import measure as sparsity_rows

NO_BATCH = "no kernel above batch 1 on this machine"
ANY_BATCH = 1 << 30  # attention reads a cache for each sequence, however many they are


@dataclass(frozen=True)
class Kernels:
    """What is known of a method's kernels before they are timed.

    thresholds: its fixed thresholds, where it comes to those alone. message: how kernels compared with masks. skipped:
    share of the block weights that a decode token was counted to skip. cache: share of the KV cache that it was counted
    to read. no_zero_batch, no_batch: what keeps the kernel
    at 0 %, and the method, from a batch, in words. ran: the projections that a kernel ran in a batch.
    """

    thresholds: ThresholdOf | None
    message: str
    skipped: float
    cache: float
    no_zero_batch: str | None
    no_batch: str | None
    ran: frozenset[str]


def variants(
    view: View, methods: Fitted, policy: Policy, sparsity: float, config: Mapping[str, Any], windows: Tensor
) -> list[Variant]:
    """Dense first, then (for a method) its kernels at 0 %, itself, and the ideal slice. Kernels are checked before.

    config: `execution` (auto, kernel or masked), `compile` (also the compiled step, on a CPU) and the grid. Raises
    `KernelMismatchError` where kernels and masks disagree, and with execution=kernel `NoKernelRanError` where torch's
    operators took the place of every kernel; with auto the method is then masked, and its rows say why.
    """
    plan = dense_variants(view)
    check_dense_step(view, windows)
    plan += dense_chain(view, config, windows) + dense_batch(view, windows)
    compiles = config["compile"] and view.device.type != "cuda"
    if not any(method.sites for method, _ in methods):
        return plan + (compiled(view, None, {}, 1.0) if compiles else [])
    masked = Variant("masked", lambda: attached(view, methods, policy), no_kernel(view, methods))
    masked.masks_prompt = policy.phase == "all"
    possible = "kernels" not in view.limits and any(has_kernels(method) for method, _ in methods)
    if config["execution"] == "masked" or (config["execution"] == "auto" and not possible):
        return [*plan, masked]
    try:
        known = checked(view, methods, policy, windows)
    except NoKernelRanError as error:
        if config["execution"] == "kernel":
            raise
        masked.columns = {"message": str(error)}
        return [*plan, masked]
    union = None if known.no_batch else partial(union_read, view, methods, policy, known.ran)
    if fits_fused_step(view) and (limits := fused_thresholds(view, methods, policy)) is not None:
        rewrite = partial(rewritten, view, methods, policy)
        attach = within(rewrite, fused(view, "columns", limits, sparsity))
        error = check_blocks(view, methods, policy, windows[:1, :64].to(view.device), attach)
        known = replace(known, message=f"{known.message}; fused step equals masked within {error:.1e} by block")
        chain = method_chain(view, methods, policy, limits, rewrite, 1 - known.skipped, config, windows)
        batch_attach = within(rewrite, within(lambda: own_gemv(view, limits), lambda: framed(view)))
        check_blocks(view, methods, policy, prompts(windows, 2, 64).to(view.device), batch_attach)
        return plan + fused_plan(view, known, attach, batch_attach, sparsity, union) + chain
    batch = method_batch(view, methods, policy, known.cache, windows)
    steps, reason = method_step(view, methods, policy, known.skipped, windows)
    if reason is not None:
        known = replace(known, message=f"{known.message}; not fused: {reason}")
    frame, reason = frame_of(view, methods, policy, windows)
    if reason is not None:
        known = replace(known, message=f"{known.message}; {reason}")
    chain = []
    if fits_fused_step(view) and (found := fused_choice(view, methods, policy)) is not None:
        rewrite, reads = partial(rewritten, view, methods, policy), 1 - known.skipped
        chain = method_chain(view, methods, policy, found[0], rewrite, reads, config, windows, found[1])
    return plan + module_plan(view, methods, policy, known, union, compiles, frame) + chain + steps + batch


def fits_fused_step(view: View) -> bool:
    """Whether this model's step runs fused, in a CUDA graph, on this machine."""
    return _has_gpu_kernels(view) and no_fused_step(view) is None


def fits_frame(view: View) -> bool:
    """Whether this model's blocks run in our norms and attention on this machine, whatever their activation."""
    return _has_gpu_kernels(view) and no_frame(view) is None


def _has_gpu_kernels(view: View) -> bool:
    return view.device.type == "cuda" and kernels.backend(view.device) is not None


def dense_variants(view: View) -> list[Variant]:
    """Every dense way that this model has on this machine, the library's first: baselines of all methods alike.

    Where a CUDA graph holds the step, the tuned one is not launched by the host as well: that would time the host.
    """
    plan = [Variant("dense")]
    if fits_fused_step(view):
        plan.append(Variant("dense", fused(view, "library"), captured=True))
        plan.append(Variant("dense", fused(view, "rows"), {"variant": "tuned GEMV"}, captured=True))
    elif has_tuned_gemv(view):
        plan.append(Variant("dense", lambda: own_gemv(view), {"variant": "tuned GEMV"}))
    return plan + dense_step(view)


def has_tuned_gemv(view: View) -> bool:
    """Whether a kernel takes the dense projections. Where torch's operators would, there is nothing to time."""
    if "kernels" in view.limits:
        return False
    weight = view.blocks[0].up.weight
    x = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return kernels.fast_path(x, weight if weight.is_contiguous() else weight.t())


def fused(view: View, linear: Linear, thresholds: ThresholdOf | None = None, expected: float = 0.5) -> Attach:
    """How the fused step is attached."""
    return lambda: fast_decode(view, linear, thresholds, expected_sparsity=expected)


def fused_plan(
    view: View, known: Kernels, attach: Attach, attach_batch: Attach, sparsity: float, union: Any
) -> list[Variant]:
    """Fixed thresholds in the fused step of a GPU, as they are attached, and the same kernels at 0 %."""
    return [
        Variant(
            "kernel", fused(view, "columns", expected=sparsity), {"sparsity_requested": 0.0}, captured=True,
            attach_batch=within(lambda: own_gemv(view, limits={}), lambda: framed(view)), no_batch=known.no_zero_batch,
        ),
        Variant(
            "kernel", attach, {"message": known.message}, 1 - known.skipped,
            captured=True, attach_batch=attach_batch, no_batch=known.no_batch, union=union,
        ),
    ]  # fmt: skip


def frame_of(view: View, methods: Fitted, policy: Policy, windows: Tensor) -> tuple[Attach | None, str | None]:
    """What the module's steps run in where a CUDA graph can hold them, or None; and what is to be said of that.

    A step that does not come to what masks give, or at which the host waits, is launched by the host.
    """
    if not fits_frame(view) or any(method.own_kernels for method, _ in methods):
        return None, None
    attach = within(lambda: kernel_execution(view, methods, policy), lambda: framed(view))
    prompt = windows[:1, :64].to(view.device)
    try:
        error = check_blocks(view, methods, policy, prompt, attach)
        check_blocks(view, methods, policy, prompts(windows, 2, 64).to(view.device), attach)
    except KernelMismatchError as wrong:
        return None, f"launched by the host: in our norms and attention, {wrong}"
    reason = not_captured(view, attach, prompt)
    if reason is not None:
        return None, f"launched by the host: {reason}"
    return lambda: framed(view), f"in our norms and attention it equals masked within {error:.1e} by block"


def module_plan(
    view: View, methods: Fitted, policy: Policy, known: Kernels, union: Any, compiles: bool, frame: Attach | None = None
) -> list[Variant]:
    """Kernels inside the module: at 0 %, the method, the ideal slice; on a CPU also compiled.

    frame: what they run in where a CUDA graph holds the step; None: the host launches it.
    """
    message = known.message
    held = frame is not None
    inside = (lambda attach: within(attach, frame)) if frame is not None else (lambda attach: attach)
    if compiles and known.thresholds is None:
        message += "; not compiled: the method decides more at run time than fixed thresholds"
    shares = ideal_slice(view, methods, known.skipped)
    weights = sum(share * view.weights(name) for name, share in shares.items())
    plan = [
        Variant(
            "kernel", inside(lambda: own_gemv(view, limits={})), {"sparsity_requested": 0.0},
            no_batch=known.no_zero_batch, captured=held,
        ),
        Variant(
            "kernel", inside(lambda: kernel_execution(view, methods, policy)), {"message": message}, 1 - known.skipped,
            known.cache, no_batch=known.no_batch, union=union, captured=held,
            most=ANY_BATCH if "attention" in known.ran else kernels.MAX_ROWS, masks_prompt=policy.phase == "all",
        ),
        Variant(
            "dense_slice", inside(lambda: sliced(view, shares)), {}, 1 - weights / view.block_weights, captured=held
        ),
    ]  # fmt: skip
    if compiles and known.thresholds is not None:
        plan += compiled(view, known.thresholds, {"message": message}, 1 - known.skipped)
    return plan


def checked(view: View, methods: Fitted, policy: Policy, windows: Tensor) -> Kernels:
    """Compare kernels with masks for one sequence and for two, and count what the method skips."""
    one = check_kernels(view, methods, windows[:1, :64].to(view.device))
    two = check_kernels(view, methods, prompts(windows, 2, 64).to(view.device))
    message = f"kernel equals masked within {max(one.error, two.error):.1e} ({kernels.backend(view.device)})"
    if one.masked:
        message += f"; no kernel for {', '.join(sorted(one.masked))}"
    nothing = None if kernels.batch_path(torch.zeros(2, 1, dtype=view.dtype, device=view.device)) else NO_BATCH
    counted = sparsity_rows(view, methods, policy, windows[:1])
    skipped, unread = (
        next(
            row["value"]
            for row in counted
            if (row["metric"], row["site"], row["step_phase"], row["layer"]) == ("achieved", site, "decode", None)
        )
        for site in ("model", "kv")
    )
    thresholds = static_thresholds(view, methods)
    no_batch = nothing or left_masked(two)
    if "attention" in two.ran:
        message += "; in a batch only attention skips"
        no_batch = None
    return Kernels(thresholds, message, skipped, 1 - unread, nothing, no_batch, two.ran)


def left_masked(check: Check) -> str | None:
    """Which projections kernels leave masked in a batch, in words, or None."""
    if not check.masked:
        return None
    kept = f"; only {', '.join(sorted(check.ran))} skip in a batch" if check.ran else ""
    return f"no kernel for a batch of {', '.join(sorted(check.masked))}{kept}"


def no_kernel(view: View, methods: Fitted) -> Row:
    """The columns of masked execution: why the model or its methods leave no choice."""
    if "kernels" in view.limits:
        return {"message": view.limits["kernels"]}
    reasons = [
        f"{method.name} has no kernel"
        + (": it decides from outputs, when the work is done" if OUTPUT in method.sites.values() else "")
        for method, _ in methods
        if method.sites and not has_kernels(method)
    ]
    return {"message": "; ".join(reasons)} if reasons else {}


def compiled(view: View, thresholds: ThresholdOf | None, columns: Row, reads: float) -> list[Variant]:
    """The compiled variants: the library's dense, and with thresholds the tuned GEMV, the kernel at 0 % and the method.

    The model is copied twice: as it is, and with transposed weights, which the last three share.
    """
    plan = [Variant("dense_compiled", decoder=copy.deepcopy(view.model))]
    if thresholds is None:
        return plan
    model = copy.deepcopy(view.model)
    for execution, limits, own, share in (
        ("dense_compiled", None, {"variant": "tuned GEMV"}, 1.0),
        ("kernel_compiled", {}, {"sparsity_requested": 0.0}, 1.0),
        ("kernel_compiled", thresholds, columns, reads),
    ):
        shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
        variant = Variant(execution, columns=own, reads=share, decoder=copy.deepcopy(model, shared))
        variant.held.enter_context(own_gemv(view_of(variant.decoder), limits=limits))
        plan.append(variant)
        model = variant.decoder  # its weights are transposed by now
    return plan


@contextmanager
def rewritten(view: View, methods: Fitted, policy: Policy) -> Iterator[None]:
    """The model as its methods rewrite it for a policy, without what they decide, until the context ends."""
    with ExitStack() as stack:
        with view.tracker.tracking(policy):  # constants become biases where every token is sparse
            changes = [method.rewrite(view, state) for method, state in methods]
        for change in changes:
            stack.enter_context(change)
        yield


def fused_thresholds(view: View, methods: Fitted, policy: Policy) -> ThresholdOf | None:
    """Thresholds of nested methods that come to fixed ones in a model with other parameters; else None.

    A constant as a bias is such a parameter. Hooks of a method's own would be passed over by a fused step.
    """
    selecting = [(method, state) for method, state in methods if method.sites]
    if len(selecting) != 1:
        return None
    with rewritten(view, methods, policy):
        if hooked(view) is not None or no_fused_step(view) is not None:
            return None
    return _thresholds(view, *selecting[0])


@torch.no_grad()
def fused_choice(view: View, methods: Fitted, policy: Policy) -> tuple[ThresholdOf, Guesses] | None:
    """As `fused_thresholds`, of methods that choose the neurons by a copy in few bits: those of attention, and what
    chooses; else None.
    """
    selecting = [(method, state) for method, state in methods if method.sites]
    if len(selecting) != 1 or not {"neurons"} <= set(selecting[0][0].sites) <= {"attn_in", "attn_out", "neurons"}:
        return None
    method, state = selecting[0]
    with rewritten(view, methods, policy):  # the copy has the biases that are there
        if hooked(view) is not None or no_fused_step(view) is not None:
            return None
        guesses = method.guesses(view, method.plan(view, state))
    thresholds = _thresholds(view, method, state, without=("neurons",))
    return None if thresholds is None or not guesses else (thresholds, guesses)


def static_thresholds(view: View, methods: Fitted) -> ThresholdOf | None:
    """(projection, layer) -> threshold, where one method comes to fixed ones in the model as it is; else None."""
    if len(methods) != 1 or not isinstance(methods[0][0].rewrite(view, methods[0][1]), nullcontext):
        return None
    return _thresholds(view, *methods[0])


def _thresholds(view: View, method: Method, state: State, without: Collection[str] = ()) -> ThresholdOf | None:
    """(projection, layer) -> threshold, where a method comes to fixed thresholds at channel sites; else None.

    without: sites that are left out.
    """
    thresholds: dict[tuple[str, int], Tensor | float] = {}
    if not has_kernels(method):
        return None
    plan = method.plan(view, state)
    for site in (site for site in method.sites if site not in without):
        for layer in range(view.n_layers):
            for projection in PROJECTIONS.get(site, ()):
                if projection not in view.projection_names():
                    continue
                x = torch.zeros(1, 1, view.channels(projection), dtype=view.dtype, device=view.device)
                chosen = method.select(plan, site, layer, x, single_step(view.device))
                own = chosen.get(projection) if isinstance(chosen, Mapping) else chosen
                if not isinstance(own, Thresholds):
                    return None
                thresholds[projection, layer] = own.t
        if site not in PROJECTIONS:
            return None
    return thresholds


def single_step(device: torch.device) -> Step:
    """The step of one decode token, to ask a method what it decides."""
    yes = torch.ones(1, 1, dtype=torch.bool, device=device)
    return Step(valid=yes, decode=yes, position=yes.long(), sparse=None, past=1, input_ids=None)
