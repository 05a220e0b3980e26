"""The fused CPU step against masked execution: nothing is timed before this has passed in the same process.

Rounding may move a value over a threshold, and what that changes moves others, so each part of a layer is shown what
the masked module showed it. The logits of whole steps are compared as well, within what moved decisions may come to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from harness.execution.attach import Fitted, attached
from harness.execution.check import TOLERANCE, KernelMismatchError
from harness.execution.fused_cpu import PER_LAYER, FusedStep, PackedWeights, dequantised, fused_decode
from harness.model.sees import OUTPUT
from harness.model.step import Policy
from harness.model.view import View

# Largest relative L2 error of a part by the module's dtype. In low bits activations have 16 bits of the largest, which
# outliers of real models make coarse: 1.2e-3 is seen in SmolLM2-135M.
LOW_BIT = {torch.float32: 4e-3, torch.bfloat16: 2e-2}
# Of attention in bf16 more: a softmax of large scores multiplies their rounding, here and in the module. 3.2e-2 is
# seen in a layer of SmolLM2-135M in int8 on one processor, 1.2e-2 on another, under 6e-4 in fp32.
ATTENDED = 2.5
# Of the logits of a whole step: of the dense model, and where decisions can move (unrelated logits differ by 1.4). In
# low bits those of bf16 hold.
DENSE_LOGITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
MOVED_LOGITS = {torch.float32: 1e-2, torch.bfloat16: 1.0}


@dataclass(frozen=True)
class FusedCheck:
    """Relative L2 errors: the worst part of a layer (or the head), and the logits of whole steps."""

    part: float
    logits: float


@dataclass
class Seen:
    """What passed a layer in one step, and what it became: tensors by place."""

    values: dict[tuple[int, str], Tensor]
    logits: Tensor


@torch.no_grad()
def check_fused(
    view: View, methods: Fitted, policy: Policy, prompt: Tensor, packed: PackedWeights | None = None, steps: int = 2
) -> FusedCheck:
    """Compare the last `steps` tokens of a prompt [1, tokens], decoded one by one, with the masked module.

    Raises `KernelMismatchError` where an error is above the tolerance, UnsupportedError where the step does not fit.
    """
    tokens = list(prompt[:, -steps:].split(1, dim=1))
    with ExitStack() as stack:
        if packed is not None:
            stack.enter_context(dequantised(view, packed, methods))
        values: dict[tuple[int, str], Tensor] = {}
        with _watching(view, values, "raw"), attached(view, methods, policy), _watching(view, values, "kept"):
            past = _filled(view, prompt, steps)
            expected = []
            for token in tokens:
                logits = _decode(view, token, past)
                expected.append(Seen(dict(values), logits))
    part = attended_error = logits_error = 0.0
    with fused_decode(view, methods, policy, packed) as fused:
        cache = _filled(view, prompt, steps)
        for number, (token, seen) in enumerate(zip(tokens, expected, strict=True)):
            own = _decode(view, token, cache)
            if fused.fused != number + 1:
                raise KernelMismatchError("the fused step did not run where it was asked to")
            logits_error = max(logits_error, _error(own, seen.logits))
            for layer in range(view.n_layers):
                cache.layers[layer].keys.copy_(past.layers[layer].keys)  # of the tokens before, as masks made them
                cache.layers[layer].values.copy_(past.layers[layer].values)
                for name, error in _parts(fused, methods, layer, seen.values, cache):
                    if name == "attended":
                        attended_error = max(attended_error, error)
                    else:
                        part = max(part, error)
            fused.step.begin(seen.values[view.n_layers - 1, "out raw"].flatten())
            fused.run(PER_LAYER * view.n_layers, fused.step.stages)
            part = max(part, _error(fused.step.buffer("logits"), seen.logits))
    moves = any(method.sites for method, _ in methods)
    rounding = view.dtype if packed is None else torch.bfloat16
    allowed = (MOVED_LOGITS if moves else DENSE_LOGITS)[rounding]
    limit = (TOLERANCE if packed is None else LOW_BIT)[view.dtype]
    of_attention = limit * (ATTENDED if packed is not None and view.dtype == torch.bfloat16 else 1)
    for what, error, most in (
        ("a part", part, limit),
        ("attention", attended_error, of_attention),
        ("a whole step", logits_error, allowed),
    ):
        if not error <= most:
            raise KernelMismatchError(
                f"the fused step: {what} differs from masked execution by {error:.1e} (tolerance {most:.0e})"
            )
    return FusedCheck(max(part, attended_error), logits_error)


@contextmanager
def _watching(view: View, values: dict[tuple[int, str], Tensor], when: str) -> Iterator[None]:
    """Keep what enters and leaves the parts of every layer: "raw" before a method's hooks, "kept" after them."""
    handles: list[Any] = []

    def keep(key: tuple[int, str], x: Any) -> None:
        values[key] = (x[0] if isinstance(x, tuple) else x).clone()

    def before(module: nn.Module, key: tuple[int, str]) -> None:
        handles.append(module.register_forward_pre_hook(lambda _m, args: keep(key, args[0])))

    def after(module: nn.Module, key: tuple[int, str]) -> None:
        handles.append(module.register_forward_hook(lambda _m, _args, out: keep(key, out)))

    for layer, block in enumerate(view.blocks):
        for name, module in (("attended", block.o), ("hidden", block.down)):
            before(module, (layer, f"{name} {when}"))
        if when == "raw":
            before(block.layer, (layer, "in raw"))
            after(block.layer, (layer, "out raw"))
        else:  # what a method's rewrite has made of them
            for name, norm in zip(("first", "second"), view.norms[layer], strict=True):
                after(norm, (layer, f"{name} kept"))
            for name, module in (("o", block.o), ("down", block.down)):
                after(module, (layer, f"{name} kept"))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(
    fused: FusedStep, methods: Fitted, layer: int, seen: dict[tuple[int, str], Tensor], cache: StaticCache
) -> Iterator[tuple[str, float]]:
    """The error of each part of a layer, by what it makes, shown what the masked module showed it.

    The token is the cache's newest.
    """
    sees = {site: what for method, _ in methods for site, what in method.sites.items()}
    at, step = layer * PER_LAYER, fused.step

    def run(first: int, last: int) -> None:
        fused.run(at + first, at + last)

    def show(buffer: str, name: str) -> None:
        step.buffer(buffer).copy_(seen[layer, name].flatten())

    def error(buffer: str, name: str, where: str | None = None) -> float:
        kept = 1 if where is None else seen[layer, where].flatten() != 0
        return _error(step.buffer(buffer) * kept, seen[layer, name].flatten() * kept)

    def shown(name: str, site: str) -> str:  # what a method dropped before it was computed is zero
        return f"{name} raw" if sees.get(site, OUTPUT) == OUTPUT else f"{name} kept"

    cache.layers[layer].cumulative_length.sub_(1)
    step.begin(seen[layer, "in raw"].flatten())
    run(0, 1)
    yield "normed", error("normed", "first kept")
    show("normed", "first kept")
    run(1, 2)
    yield "attended", error("attended", "attended raw", "attended kept")
    step.begin(torch.zeros_like(seen[layer, "in raw"]).flatten())
    show("attended", shown("attended", "heads"))
    run(2, 3)
    yield "o", error("residual", "o kept")
    step.begin(seen[layer, "in raw"].flatten() + seen[layer, "o kept"].flatten())
    run(3, 4)
    yield "normed", error("normed", "second kept")
    show("normed", "second kept")
    run(4, 6)
    yield "hidden", error("hidden", "hidden raw", "hidden kept")
    step.begin(torch.zeros_like(seen[layer, "in raw"]).flatten())
    show("hidden", shown("hidden", "neurons"))
    run(6, 7)
    yield "down", error("residual", "down kept")


def _filled(view: View, prompt: Tensor, steps: int) -> StaticCache:
    cache = StaticCache(config=view.model.config, max_cache_len=prompt.shape[1] + 1)
    view.model(prompt[:, :-steps], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _decode(view: View, token: Tensor, cache: StaticCache) -> Tensor:
    return view.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


def _error(y: Tensor, expected: Tensor) -> float:
    return ((y.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)).item()
