"""Whole blocks of a step against masked execution, each shown what the masked module showed it.

For steps whose parts can't be looked at one by one (chained launches, a batch's attention). Rounding may move a value
over a threshold, and what that changes moves others, so a block may be off by what one rounding of its input does to
the masked block itself. That leaves room for wrong arithmetic where something is selected; check the dense step too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from harness.execution.attach import Fitted, attached
from harness.execution.check import TOLERANCE, KernelMismatchError
from harness.model.sees import PROMPT
from harness.model.step import Policy, Step
from harness.model.view import View

FLIPS = 0.1  # relative L2 error in 16 bits that values moved over a threshold may come to, alone
ROUNDINGS = 3  # of the input, that a block may be off by
DRAWS = 4  # of such a rounding: which values it moves over a threshold is chance
CHOSEN = 0.9  # share of blocks that must agree where heads are chosen: a tie that turns out the other way is no error


@dataclass
class Shown:
    """One block of a masked step. x: its input [batch, 1, d_model]; kwargs: what else it was called with.

    added: what it added to x, float64; moved: the same for inputs that are off by half a rounding, DRAWS of them.
    """

    x: Tensor
    kwargs: dict[str, Any]
    added: Tensor
    moved: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def check_blocks(
    view: View, methods: Fitted, policy: Policy, prompt: Tensor, attach: Callable[[], AbstractContextManager[Any]]
) -> float:
    """The largest relative L2 error of what a block adds to the residual stream, for the last token of a prompt.

    prompt: int64 [batch, tokens]. attach: the step to be checked. Where a method drops heads, the largest of all blocks
    and sequences but a tenth. Raises `KernelMismatchError` where that is above the dtype's tolerance and above what
    roundings do, and where logits of the whole step are not finite.
    """
    cache = StaticCache(config=view.model.config, max_cache_len=prompt.shape[1] + 1)
    with attached(view, methods, policy):
        view.model(prompt[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        shown = _shown(view, prompt[:, -1:], cache)
        step = view.tracker.step
    errors, limits = [], []
    with attach(), _at_step(view, step):
        _decide_from(view, methods, prompt)
        for layer, one in enumerate(shown):
            _back(cache, layer)
            added = _added(view.blocks[layer].layer, one.x, one.kwargs)
            errors.append(_errors(added, one.added))
            limits.append(ROUNDINGS * torch.stack([_errors(moved, one.added) for moved in one.moved]).amax(0))
    with attach():
        _decide_from(view, methods, prompt)
        for layer in range(view.n_layers):
            _back(cache, layer)
        logits = view.model(prompt[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    selects = any(method.sites for method, _ in methods)
    least = FLIPS if selects and view.dtype != torch.float32 else TOLERANCE[view.dtype]
    wrong, allowed = torch.stack(errors), torch.stack(limits).clamp(min=least)
    share = CHOSEN if any("heads" in method.sites for method, _ in methods) else 1.0
    agree = (wrong <= allowed).double().mean().item()
    if not agree >= share or not torch.isfinite(logits).all():
        layer, sequence = divmod(int((wrong / allowed).nan_to_num(torch.inf).argmax()), wrong.shape[1])
        raise KernelMismatchError(
            f"block {layer}, sequence {sequence}: the step differs from masked execution by "
            f"{wrong[layer, sequence]:.1e} (tolerance {allowed[layer, sequence]:.0e}); {agree:.0%} of blocks agree"
        )
    return wrong.flatten().quantile(share).item()


def _decide_from(view: View, methods: Fitted, prompt: Tensor) -> None:
    """Methods that decide from a prompt decide anew each time that they are attached."""
    if any(PROMPT in method.sites.values() for method, _ in methods):
        step = view.tracker.step
        view.model(prompt[:, :-1], use_cache=True, logits_to_keep=1)
        view.tracker.step = step


@contextmanager
def _at_step(view: View, step: Step | None) -> Iterator[None]:
    """Blocks that are called by themselves decide as in this step."""
    before, view.tracker.step = view.tracker.step, step
    try:
        yield
    finally:
        view.tracker.step = before


def _shown(view: View, token: Tensor, cache: StaticCache) -> list[Shown]:
    """Decode a token in the module as it stands, and see what goes into every block and what it adds."""
    shown: list[Shown] = []
    with _watching(view, shown):
        view.model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
    generator = torch.Generator().manual_seed(0)
    half = torch.finfo(view.dtype).eps / 2
    for layer, one in enumerate(shown):
        for _ in range(DRAWS):
            off = 1 + half * torch.randn(one.x.shape, generator=generator).to(one.x.device)
            _back(cache, layer)
            one.moved.append(_added(view.blocks[layer].layer, (one.x.float() * off).to(one.x.dtype), one.kwargs))
    return shown


@contextmanager
def _watching(view: View, shown: list[Shown]) -> Iterator[None]:
    def after(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        x = args[0].clone() if args else kwargs["hidden_states"].clone()
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        shown.append(Shown(x, rest, y.double() - x.double()))

    with ExitStack() as stack:
        for block in view.blocks:
            stack.callback(block.layer.register_forward_hook(after, with_kwargs=True).remove)
        yield


def _added(layer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    out = layer(x.clone(), **kwargs)
    return (out[0] if isinstance(out, tuple) else out).double() - x.double()


def _back(cache: StaticCache, layer: int) -> None:
    """The newest token of a layer is written again."""
    cache.layers[layer].cumulative_length.sub_(1)


def _errors(y: Tensor, expected: Tensor) -> Tensor:
    """Relative L2 error of each sequence, [batch]."""
    norm = expected.flatten(1).norm(dim=1).clamp(min=1e-12)
    return (y - expected).flatten(1).norm(dim=1) / norm
