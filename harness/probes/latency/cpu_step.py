"""The fused CPU step among the variants, checked against masked execution before it is timed."""

from __future__ import annotations

from torch import Tensor

import kernels
from harness.errors import UnsupportedError
from harness.execution.attach import Fitted
from harness.execution.fused_check import check_fused
from harness.execution.fused_cpu import fused_decode, unfit, unfit_methods
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.latency.variants import Variant


def no_cpu_step(view: View) -> str | None:
    """Why this model's step does not run fused on this machine, or None."""
    if view.device.type == "cpu" and kernels.backend(view.device) is None:
        return "no kernels on this machine"
    return unfit(view)


def dense_step(view: View) -> list[Variant]:
    """The dense fused step, where the model has one: a baseline of all methods alike."""
    return [Variant("dense", lambda: fused_decode(view), fused=True)] if no_cpu_step(view) is None else []


def check_dense_step(view: View, windows: Tensor) -> None:
    """Raises `KernelMismatchError` where the dense fused step does not give what the module gives."""
    if no_cpu_step(view) is None:
        check_fused(view, (), Policy(), windows[:1, :64])


def method_step(
    view: View, methods: Fitted, policy: Policy, skipped: float, windows: Tensor
) -> tuple[list[Variant], str | None]:
    """A method in the fused step, or why it is not in there. skipped: share of the block weights.

    Raises `KernelMismatchError` where it does not give what masked execution gives.
    """
    if view.device.type != "cpu":
        return [], None
    reason = no_cpu_step(view) or unfit_methods(methods)
    if reason is not None:
        return [], reason
    try:
        found = check_fused(view, methods, policy, windows[:1, :64])
    except UnsupportedError as error:  # what a method makes of the model, by hooks, does not fit
        return [], str(error)
    message = f"fused step equals masked within {found.part:.1e} by part"
    attach = lambda: fused_decode(view, methods, policy)  # noqa: E731
    masks = policy.phase == "all"
    return [Variant("kernel", attach, {"message": message}, 1 - skipped, fused=True, masks_prompt=masks)], None
