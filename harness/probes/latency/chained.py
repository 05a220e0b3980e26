"""The chained step of a GPU among the variants, checked block by block against masked execution before it is timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.execution.attach import Fitted
from harness.execution.block_check import check_blocks
from harness.execution.chained_step import chained_decode, no_chained_step
from harness.execution.fused_step import ThresholdOf
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.latency.variants import Row, Variant

CAPABILITY = (9, 0)  # of GPUs that start a launch before the one before it ends
CHECKED = 64  # tokens that the check decodes after


def no_chain(view: View) -> str | None:
    """Why this model's step does not run chained on this machine, or None."""
    if view.device.type != "cuda":
        return "the chained step runs on a GPU"
    if torch.cuda.get_device_capability(view.device) < CAPABILITY or not hasattr(torch.cuda, "_compile_kernel"):
        return "the chained step needs a GPU and a torch that start launches early"
    return no_chained_step(view)


def dense_chain(view: View, config: Mapping[str, Any], windows: Tensor) -> list[Variant]:
    """The dense chained step, where the model has one: a baseline of all methods alike."""
    return [] if no_chain(view) else [_variant(view, (), Policy(), {}, config, windows, "dense", 1.0)]


def method_chain(
    view: View, methods: Fitted, policy: Policy, thresholds: ThresholdOf, reads: float, config: Mapping[str, Any],
    windows: Tensor,
) -> list[Variant]:  # fmt: skip
    """A method that comes to fixed thresholds in the chained step. reads: share of the block weights.

    Raises `KernelMismatchError` where a block does not give what masked execution gives.
    """
    return [] if no_chain(view) else [_variant(view, methods, policy, thresholds, config, windows, "kernel", reads)]


def _variant(
    view: View, methods: Fitted, policy: Policy, thresholds: ThresholdOf, config: Mapping[str, Any], windows: Tensor,
    execution: str, reads: float,
) -> Variant:  # fmt: skip
    capacity = max(CHECKED + 1, max(config["context"]) + config["new_tokens"])
    attach = lambda: chained_decode(view, thresholds, capacity)  # noqa: E731
    error = check_blocks(view, methods, policy, windows[:1, :CHECKED].to(view.device), attach)
    columns: Row = {"message": f"chained step equals masked within {error:.1e} by block"}
    columns |= {"variant": "tuned GEMV"} if execution == "dense" else {}
    return Variant(execution, attach, columns, reads, captured=True, chained=True)
