"""SPON: one learnt constant vector a projection stands in for the inputs that are dropped (arXiv 2512.12744)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.step import Policy
from harness.model.view import View
from methods.distillation import distil, run

Constants = Mapping[tuple[str, int], Tensor]  # (projection, layer) -> float32 [outputs]


@dataclass(frozen=True)
class Spon(Method):
    """Adds W a to every projection's output, a constant in the place of what the method beside it drops (section 3).

    W a is what is learnt and kept: a bias, which costs no kernel anything. It starts at the mean of what is dropped and
    is trained to bring the sparse model's next-token distribution back to the dense one's (KL divergence), with the
    other methods attached and all weights frozen. To be nested with a method that drops: `method=[spon,teal]`.

    epochs: passes of training over the calibration text, one step a window; 0 leaves the start. The paper trains on
        more text than the default calibration has: raise calibration.tokens, and epochs where there is a GPU.
    learning_rate: of AdamW without decay, falling to zero by a cosine.
    """

    epochs: int = 1
    learning_rate: float = 2e-3

    name: ClassVar[str] = "spon"
    paper: ClassVar[str] = "arXiv 2512.12744"
    needs: ClassVar[str] = "calibration"
    compensates: ClassVar[bool] = True
    fit_fields: ClassVar[tuple[str, ...]] = ("epochs", "learning_rate")

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 0:
            raise ConfigError(f"method.spon.epochs must be a whole number of at least 0, not {self.epochs!r}")
        if self.learning_rate <= 0:
            raise ConfigError(f"method.spon.learning_rate must be above 0, not {self.learning_rate}")

    @property
    def trains(self) -> bool:
        """The start is a mean, the rest is gradients."""
        return self.epochs > 0

    def fit(self, view: View, calibration: Calibration) -> State:
        """By projection float32 [layers that have it, outputs]; and `kl` [steps], nats a token before each step."""
        constants = dropped_means(view, calibration)
        windows = [row[None] for batch in calibration.batches for row in batch]
        with added(view, constants):
            groups = [{"params": list(constants.values()), "lr": self.learning_rate}]
            kl = distil(view, windows * self.epochs, groups) if self.epochs else []
        state = {}
        for p in view.projection_names():
            state[p] = torch.stack([constants[p, n].cpu() for n in range(view.n_layers) if (p, n) in constants])
        return state | {"kl": torch.tensor(kl)}

    def rewrite(self, view: View, state: State) -> AbstractContextManager[None]:
        """The constants as biases where every token is sparse; else added to the sparse tokens alone."""
        if self.sparsity == 0:
            return nullcontext()
        names = view.projection_names()
        constants = {(p, layer): c for p in names for layer, c in enumerate(state[p].to(view.device, view.dtype))}
        if view.tracker.policy == Policy():
            return biased(view, constants)
        return added(view, constants)


@contextmanager
def biased(view: View, constants: Constants) -> Iterator[None]:
    """Fold constants into the biases of the projections that have one until the context ends."""
    before: list[tuple[nn.Linear, Any]] = []  # a parameter, or None where there was no bias
    outside = view.own_biases
    own_biases: dict[tuple[str, int], Tensor | None] = {}
    try:
        for layer, block in enumerate(view.blocks):
            for name, module in block.projections():
                if (name, layer) in constants:
                    before.append((module, module.bias))
                    own_biases[name, layer] = module.bias
                    own = constants[name, layer].to(module.weight.device)
                    bias = own if module.bias is None else module.bias.data + own
                    module.bias = nn.Parameter(bias, requires_grad=False)
        view.own_biases = {**own_biases, **outside}
        yield
    finally:
        view.own_biases = outside
        for module, own in reversed(before):
            module.bias = own


@contextmanager
def added(view: View, constants: Constants) -> Iterator[None]:
    """Add constants to what the projections give for sparse tokens until the context ends. Gradients reach them."""

    def hook_of(constant: Tensor):  # noqa: ANN202 (a torch hook)
        def hook(_m: nn.Module, _a: tuple, out: Tensor) -> Tensor:
            step = view.tracker.step
            own = constant.to(out)
            if step is None or step.sparse is None:
                return out + own
            return out + torch.where(step.sparse[..., None].to(out.device), own, 0).view(*out.shape[:-1], -1)

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(view.blocks):
            for name, module in block.projections():
                if (name, layer) in constants:
                    stack.callback(module.register_forward_hook(hook_of(constants[name, layer])).remove)
        yield


def dropped_means(view: View, calibration: Calibration) -> dict[tuple[str, int], Tensor]:
    """W E[x - S(x)], float32 [outputs] by (projection, layer): S(x) is what attached methods leave of an input x.

    Less W E[x - S(x)] of tokens that are dense: a method that moves inputs (SCAP's centre) makes up for that itself.
    """
    dropped = left_out(view, calibration.tokens, lambda: calibration.visit({}))
    few = calibration.batches[0]
    moved = left_out(view, few.numel(), lambda: run(view, few, dense=True))
    return {
        (name, layer): module.weight.float() @ (dropped.get((name, layer), 0) - moved.get((name, layer), 0))
        if (name, layer) in dropped
        else torch.zeros(module.out_features, device=module.weight.device)
        for layer, block in enumerate(view.blocks)
        for name, module in block.projections()
    }


@torch.no_grad()
def left_out(view: View, tokens: int, passes: Callable[[], Any]) -> dict[tuple[str, int], Tensor]:
    """E[x - S(x)] over `tokens` tokens of some passes, float32 [inputs] by (projection, layer) where there is any."""
    sums: dict[tuple[str, int], Tensor] = {}
    inputs: dict[tuple[str, int], Tensor] = {}

    def whole(key: tuple[str, int]):  # noqa: ANN202 (a torch hook)
        return lambda _m, args: inputs.__setitem__(key, args[0])

    def left(key: tuple[str, int]):  # noqa: ANN202 (a torch hook)
        def hook(_m: nn.Module, args: tuple) -> None:
            x = inputs.pop(key)
            if x is not args[0]:
                sums[key] = sums.get(key, 0) + (x.float() - args[0].float()).flatten(0, -2).sum(0)

        return hook

    with ExitStack() as stack:
        for layer, block in enumerate(view.blocks):
            for name, module in block.projections():
                key = (name, layer)
                stack.callback(module.register_forward_pre_hook(whole(key), prepend=True).remove)
                stack.callback(module.register_forward_pre_hook(left(key)).remove)
        passes()
    return {key: value / tokens for key, value in sums.items()}
