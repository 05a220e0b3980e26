"""The chained step of a GPU among the variants, checked block by block against masked execution before it is timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.execution.attach import Fitted
from harness.execution.block_check import check_blocks
from harness.execution.chained_step import chained_decode, no_chained_step
from harness.execution.choice import Choice, Guesses, choices, no_choice
from harness.execution.fused_step import ThresholdOf
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.latency.variants import Attach, Row, Variant, within

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
    if no_chain(view):
        return []
    attach = _attach(view, {}, config)
    columns = {"variant": "tuned GEMV"}
    return [_variant(view, (), Policy(), attach, windows, "dense", 1.0, columns)]


def method_chain(
    view: View, methods: Fitted, policy: Policy, thresholds: ThresholdOf, rewrite: Attach, reads: float,
    config: Mapping[str, Any], windows: Tensor, guesses: Guesses | None = None,
) -> list[Variant]:  # fmt: skip
    """Methods that come to fixed thresholds in the chained step of the model that `rewrite` makes of this one.

    guesses: what chooses the neurons, where thresholds do not. reads: share of the block weights. Raises
    `KernelMismatchError` where a block does not give what masked execution gives.
    """
    with rewrite():
        if no_chain(view) or (guesses and no_choice(view, guesses)):
            return []
    chosen = choices(view, guesses) if guesses else None
    attach = within(rewrite, _attach(view, thresholds, config, chosen))
    return [_variant(view, methods, policy, attach, windows, "kernel", reads, {})]


def _attach(
    view: View, thresholds: ThresholdOf, config: Mapping[str, Any], chosen: list[Choice] | None = None
) -> Attach:
    capacity = max(CHECKED + 1, max(config["context"]) + config["new_tokens"])
    return lambda: chained_decode(view, thresholds, capacity, chosen)


def _variant(
    view: View, methods: Fitted, policy: Policy, attach: Attach, windows: Tensor, execution: str, reads: float,
    more: Row,
) -> Variant:  # fmt: skip
    error = check_blocks(view, methods, policy, windows[:1, :CHECKED].to(view.device), attach)
    columns = {"message": f"chained step equals masked within {error:.1e} by block", **more}
    return Variant(execution, attach, columns, reads, captured=True, chained=True)
