"""The fused step of a batch on a GPU among the variants: dense, and with KV heads chosen by sequence."""

from __future__ import annotations

from torch import Tensor

import kernels
from harness.execution.attach import Fitted
from harness.execution.block_check import check_blocks
from harness.execution.fused_batch import MAX_BATCH, batch_decode
from harness.execution.fused_step import no_fused_step
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.latency.timing import prompts
from harness.probes.latency.variants import Variant


def no_batch_step(view: View) -> str | None:
    """Why this model's batches do not run fused on this machine, or None."""
    if view.device.type != "cuda" or kernels.backend(view.device) is None:
        return "the fused step of a batch runs on a GPU"
    return no_fused_step(view)


def dense_batch(view: View, windows: Tensor) -> list[Variant]:
    """The library's products with fused norms and attention, for any batch: a baseline of all methods alike."""
    if no_batch_step(view) is not None:
        return []
    attach = lambda: batch_decode(view)  # noqa: E731
    error = check_blocks(view, (), Policy(), _two(view, windows), attach)
    columns = {"variant": "fused attention", "message": f"fused step equals the module within {error:.1e} by block"}
    return [Variant("dense", attach, columns, captured=True)]


def method_batch(view: View, methods: Fitted, policy: Policy, reads_cache: float, windows: Tensor) -> list[Variant]:
    """A method whose heads a linear router picks: all weights are read, and of the cache what is picked.

    Raises `KernelMismatchError` where blocks do not give what masked execution gives.
    """
    routers = methods[0][0].routers(view, methods[0][1]) if len(methods) == 1 else None
    if routers is None or no_batch_step(view) is not None:
        return []
    attach = lambda: batch_decode(view, routers)  # noqa: E731
    error = check_blocks(view, methods, policy, _two(view, windows), attach)
    columns = {"message": f"fused step equals masked within {error:.1e} by block"}
    return [Variant("kernel", attach, columns, 1.0, reads_cache, no_batch=None, most=MAX_BATCH, captured=True)]


def _two(view: View, windows: Tensor) -> Tensor:
    return prompts(windows, 2, 64).to(view.device)
