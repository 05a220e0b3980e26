"""Changes that a rewrite makes at a module by hooks which say what they do, so that a kernel can do it in their place.

The hooks are the definition. Hooks of any other kind the fused CPU step refuses, and that of a GPU all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Moved:
    """A projection reads x - centre; the number is one of the model's dtype."""

    centre: float

    def before(self, _: nn.Module, args: tuple) -> tuple:
        """A pre-hook."""
        return (args[0] - self.centre,)


@dataclass(frozen=True, eq=False)
class Turned:
    """A norm gives x Q. basis: Q [d_model, d_model] of the model's dtype."""

    basis: Tensor

    def after(self, _m: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        """A forward hook."""
        return out @ self.basis


@dataclass(frozen=True, eq=False)
class LowRank:
    """A projection gives L x too, x being its input before anything is dropped. L = out [m, r] into [r, n]."""

    out: Tensor
    into: Tensor
    _seen: list[Tensor] = field(default_factory=list)

    def before(self, _: nn.Module, args: tuple) -> None:
        """A pre-hook: masks come after it."""
        self._seen.append(args[0])

    def after(self, _m: nn.Module, _args: tuple, out: Tensor) -> Tensor:
        """A forward hook."""
        return out + F.linear(F.linear(self._seen.pop(), self.into), self.out)


Change = Moved | Turned | LowRank


@contextmanager
def changed(module: nn.Module, change: Change) -> Iterator[None]:
    """The module with a change until the context ends."""
    handles = []
    if not isinstance(change, Turned):
        handles.append(module.register_forward_pre_hook(change.before))
    if not isinstance(change, Moved):
        handles.append(module.register_forward_hook(change.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def change_of(module: nn.Module) -> Change | None:
    """The change that all hooks of a module come from; None if there is none, or if they are not of one."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    owners = {id(owner): owner for owner in (getattr(hook, "__self__", None) for hook in hooks)}
    found = next(iter(owners.values()), None)
    return found if len(owners) == 1 and isinstance(found, Change) else None
