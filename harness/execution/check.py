"""Kernels against masked execution, before anything is timed: the same numbers, and made by a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kernels
from harness.errors import UnsupportedError
from harness.execution.attach import Fitted, attached
from harness.execution.kernel import kernel_execution
from harness.execution.method import Method, State
from harness.model.step import Policy, Step
from harness.model.view import View

# Largest relative L2 error of a projection against the masked definition on the same input, by dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
POLICY = Policy("all")


class KernelMismatchError(RuntimeError):
    """A kernel does not give what masked execution gives: its time would mean nothing."""


class NoKernelRanError(UnsupportedError):
    """Torch's own operators ran in the place of every kernel: their time is not that of kernel execution."""


@dataclass(frozen=True)
class Check:
    """What a comparison of kernels with masked execution came to.

    error: largest relative L2 error. ran: the projections that a kernel computed in every layer, "attention" too.
    masked: those that have a kernel, but where none ran for this batch, dtype or machine.
    """

    error: float
    ran: frozenset[str]
    masked: frozenset[str]


@dataclass
class Recorded:
    """One decode step in masked execution.

    projections: (layer, name, input, output) in the order of computation; the input as it was before any method
    dropped of it, since not every decision from what it has left comes out the same. masked: by (layer, name), the
    inputs of o and down after that. attentions: (arguments, keywords, output) of every block, where heads are dropped,
    and cache: the prompt's keys and values that they saw. residual: the residual stream by layer, which look-ahead
    predictors see.
    """

    projections: list[tuple[int, str, Tensor, Tensor]] = field(default_factory=list)
    masked: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    attentions: list[tuple[tuple, dict[str, Any], Tensor]] = field(default_factory=list)
    cache: Any = None
    residual: dict[int, Tensor] = field(default_factory=dict)
    step: Step | None = None


@dataclass(frozen=True)
class Replayed:
    """What kernels gave for the recorded inputs, in the same order, and which projections have and ran a kernel."""

    projections: list[Tensor]
    attentions: list[Tensor]
    with_kernel: frozenset[str]
    ran: frozenset[str]


@torch.no_grad()
def check_kernels(view: View, methods: Fitted, prompt: Tensor) -> Check:
    """Compare kernels with masked execution, projection by projection, on one decode step's own inputs and masks.

    Deep logits of a thresholded model amplify rounding (a flip near a threshold breeds flips), so each projection is
    shown the input that masked execution showed it. Where heads are dropped, so is each attention as a whole, over the
    same cache. What is fixed from the prompt is fixed once, in masked execution: a second prompt, by a matrix product
    that rounds otherwise, would fix others near the cut. prompt: int64 [batch, tokens], its last token is decoded.
    Raises `KernelMismatchError` where the relative L2 error is above the dtype's tolerance, and for one sequence
    `NoKernelRanError` where no kernel computed anything.
    """
    methods = [(_planned_once(method), state) for method, state in methods]
    recorded = record(view, methods, prompt)
    replayed = replay(view, methods, prompt, recorded)
    if len(prompt) == 1 and not replayed.ran:
        names = "+".join(method.name for method, _ in methods)
        raise NoKernelRanError(
            f"no kernel ran for {names}: on this machine torch's own operators compute {view.dtype} on a "
            f"{view.device.type.upper()} in their place"
        )
    error = compare(view, methods, recorded, replayed)
    return Check(error, replayed.ran, replayed.with_kernel - replayed.ran)


def record(view: View, methods: Fitted, prompt: Tensor) -> Recorded:
    """Decode the last token of the prompt in masked execution, and keep what went into and came out of everything."""
    recorded = Recorded()
    with attached(view, methods, POLICY):
        out = view.model(prompt[:, :-1], use_cache=True, logits_to_keep=1)
        attentions = not {"heads", "kv"}.isdisjoint(_sites(methods))
        if attentions:
            recorded.cache = deepcopy(out.past_key_values)
        with _recording(view, recorded, attentions):
            view.model(prompt[:, -1:], past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        recorded.step = view.tracker.step
    return recorded


@contextmanager
def _recording(view: View, recorded: Recorded, attentions: bool) -> Iterator[None]:
    inputs: dict[tuple[int, str], Tensor] = {}

    def see(at: tuple[int, str], _: nn.Module, args: tuple, y: Tensor) -> None:
        # a copy: Falcon adds attention to what its MLP gave, in place
        recorded.projections.append((*at, inputs.pop(at), y.clone()))
        if at[1] in ("o", "down"):
            recorded.masked[at] = args[0]

    with ExitStack() as stack:
        for layer, block in enumerate(view.blocks):
            for name, module in block.projections():
                whole = module.register_forward_pre_hook(
                    lambda _m, args, at=(layer, name): inputs.update({at: args[0]}), prepend=True
                )
                handle = module.register_forward_hook(partial(see, (layer, name)))
                stack.callback(whole.remove)
                stack.callback(handle.remove)
            stream = block.residual.register_forward_pre_hook(
                lambda _m, args, layer=layer: recorded.residual.update({layer: args[0]})
            )
            stack.callback(stream.remove)
            if attentions:
                attend = block.attn.register_forward_hook(
                    lambda _m, args, kwargs, y: recorded.attentions.append((args, kwargs, y[0])), with_kwargs=True
                )
                stack.callback(attend.remove)
        yield


def replay(view: View, methods: Fitted, prompt: Tensor, recorded: Recorded) -> Replayed:
    """Show the kernels the recorded inputs. Methods with kernels of their own see the prompt first, for their cache."""
    projections, attentions, by_torch = [], [], set()
    with kernel_execution(view, methods, POLICY) as installations:
        past = recorded.cache
        if any(method.own_kernels for method, _ in methods):
            past = view.model(prompt[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        view.tracker.step = recorded.step
        for installation in installations:
            installation.called.clear()
            installation.residual.update(recorded.residual)
        for layer, name, x, _ in recorded.projections:
            before = kernels.calls_by_torch()
            projections.append(getattr(view.blocks[layer], name)(x))
            if kernels.calls_by_torch() > before:
                by_torch.add(name)
            if name == "gate":
                view.blocks[layer].act(projections[-1])  # methods that decide from the gate decide here
        for block, (args, kwargs, _) in zip(view.blocks, recorded.attentions, strict=False):
            cache = {key: past for key in ("past_key_values", "layer_past") if key in kwargs}
            before = kernels.calls_by_torch()
            attentions.append(block.attn(*args, **(kwargs | cache))[0])
            if kernels.calls_by_torch() > before:  # of its projections too: then no kernel is said to have run
                by_torch.add("attention")
        with_kernel, called = (
            frozenset[str]().union(*(getattr(installation, of) for installation in installations))
            for of in ("with_kernel", "called")
        )
    return Replayed(projections, attentions, with_kernel, called - by_torch)


def compare(view: View, methods: Fitted, recorded: Recorded, replayed: Replayed) -> float:
    """The largest relative L2 error, of all projections and attentions. Raises `KernelMismatchError`."""
    worst = 0.0
    rows_of = Rows(view, methods, recorded)
    for (layer, name, _, expected), y in zip(recorded.projections, replayed.projections, strict=True):
        rows = rows_of(layer, name)
        error = _error(view, f"layer {layer} {name}", y.flatten(0, -2)[rows], expected.flatten(0, -2)[rows])
        worst = max(worst, error)
    for layer, ((_, _, expected), y) in enumerate(zip(recorded.attentions, replayed.attentions, strict=True)):
        worst = max(worst, _error(view, f"layer {layer} attention", y, expected))
    return worst


class Rows:
    """Which outputs of a projection both must give: those of dropped heads and neurons are never made nor read."""

    def __init__(self, view: View, methods: Fitted, recorded: Recorded) -> None:
        self.view, self.sites = view, _sites(methods)
        # K and V of groups that no kept head uses need not exist where a method leaves holes in the cache.
        self.holes = any(method.own_kernels for method, _ in methods)
        self.needed = {at: x.flatten(0, -2) != 0 for at, x in recorded.masked.items()}  # bool [batch, channels]

    def __call__(self, layer: int, name: str) -> Any:
        """An index into [batch, outputs]."""
        if name == "q" and "heads" in self.sites:
            return self.needed[layer, "o"]
        if name in ("k", "v") and self.holes:
            groups = self.needed[layer, "o"].unflatten(-1, (self.view.n_kv_heads, -1)).any(-1)
            return groups.repeat_interleave(self.view.head_dim, -1)
        if name in ("gate", "up") and "neurons" in self.sites:
            return self.needed[layer, "down"]
        return slice(None)


def _planned_once(method: Method) -> Method:
    """A copy whose plan is made once: what masked execution put there while it saw the prompt, kernels find."""
    own, plans = copy(method), list[Any]()

    def plan(view: View, state: State) -> Any:
        if not plans:
            plans.append(method.plan(view, state))
        return plans[0]

    object.__setattr__(own, "plan", plan)  # methods are frozen
    return own


def _error(view: View, what: str, y: Tensor, expected: Tensor) -> float:
    error = ((y.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)).item()
    if not error <= TOLERANCE[view.dtype]:
        raise KernelMismatchError(
            f"{what}: the kernel differs from masked execution by {error:.1e} (tolerance {TOLERANCE[view.dtype]:.0e})"
        )
    return error


def _sites(methods: Fitted) -> set[str]:
    return {site for method, _ in methods for site in method.sites}
