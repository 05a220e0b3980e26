"""Steps on quantised weights: the fused CPU step in int8 or int4, dense and with the method, and nothing else.

What the module holds is de-quantised, so its own steps read bytes that no quantised model would, and are not timed.
The steps' lines have a scale for 32 weights of a line, so that what is skipped takes its scales along; where a line
is an input channel its groups cross those of the cell's format, and the values are rounded once more.
"""

from __future__ import annotations

from torch import Tensor

from harness.execution.attach import Fitted
from harness.execution.fused_check import check_fused
from harness.execution.fused_cpu import fused_decode, packed_weights, unfit_methods
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.latency.cpu_step import no_cpu_step
from harness.probes.latency.variants import Variant
from harness.probes.sparsity import measure as sparsity_rows
from kernels.lowbit import GROUP

NOTE = "prompts on de-quantised weights; steps on lines with a scale for 32 weights"


def no_step(view: View, methods: Fitted) -> str | None:
    """One sentence why no step reads this model's quantised weights, or None."""
    assert view.stored is not None
    reason = no_cpu_step(view) or unfit_methods(methods)
    if reason is None and view.stored.group != GROUP:
        reason = f"the fused CPU step has groups of {GROUP}"
    return None if reason is None else f"no kernel reads the {view.stored.name} weights of {view.name}: {reason}"


def variants(view: View, methods: Fitted, policy: Policy, windows: Tensor) -> list[Variant]:
    """The dense step and, of methods that skip, theirs; each checked against masked execution on the same values."""
    plan = [_step(view, (), Policy(), windows, "dense", 0.0)]
    if any(method.sites for method, _ in methods):
        plan.append(_step(view, methods, policy, windows, "kernel", _skipped(view, methods, policy, windows)))
    return plan


def _step(view: View, methods: Fitted, policy: Policy, windows: Tensor, execution: str, skipped: float) -> Variant:
    assert view.stored is not None
    packed = packed_weights(view, view.stored.bits, methods, head=False)
    found = check_fused(view, methods, policy, windows[:1, :64], packed)
    columns = {"message": f"fused step equals masked within {found.part:.1e} by part; {NOTE}"}
    size = sum(weight.codes.nbytes + weight.peaks.nbytes for weight in packed.values())
    attach = lambda: fused_decode(view, methods, policy, packed)  # noqa: E731
    masks = bool(methods) and policy.phase == "all"
    return Variant(execution, attach, columns, 1 - skipped, fused=True, masks_prompt=masks, block_bytes=size)


def _skipped(view: View, methods: Fitted, policy: Policy, windows: Tensor) -> float:
    """Share of the block weights that a decode token was counted to skip. Here scales go with the weights."""
    counted = {
        row["metric"]: row["value"]
        for row in sparsity_rows(view, methods, policy, windows[:1])
        if (row["site"], row["step_phase"], row["layer"]) == ("model", "decode", None)
    }
    return counted["skipped_weights"] / counted["total_weights"]
