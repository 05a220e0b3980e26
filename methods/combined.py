"""Combined: thresholds of all projections learnt together under one byte budget, with constants for what they drop.

Our own. What it joins: static magnitude thresholds (TEAL), a budget that goes where it hurts least, here by gradients
and down to single channels, and SPON's constants. Norms of columns are not needed: a threshold of its own says as much
about a channel. Left out after trials: a gain for every input and a narrower step brought nothing. A low-rank update of
the weights, merged, brought a hundredth of the perplexity, but they would no longer be the dense model's, nor quantised
weights be what is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import Quantiles
from harness.model.sees import Sees
from harness.model.selection import PROJECTIONS, Thresholds
from harness.model.step import Policy, Step
from harness.model.view import View
from methods.distillation import distil
from methods.spon import added, biased
from methods.topk import channels

Key = tuple[str, int]  # projection, layer
WIDTH = 0.3  # of the logistic step that stands in for a threshold's jump in the backward pass, in units of log|x|
BETAS = (0.9, 0.98)  # AdamW's: gradients shrink to a tenth over the training, which a longer memory holds against rates
WARM_UP = 20  # steps, and at most a quarter of all
LEAST = 1e-12  # |x| below it is taken for it, where its logarithm is needed


@dataclass(frozen=True)
class Combined(Method):
    """Drops |x_i| <= t_i at the input of every projection and adds a constant to its output, both learnt.

    t has an entry for each channel of each projection: a level for the projection plus an offset for the channel, in
    logarithms. Both are trained with the constants to bring the next-token distribution of the sparse model back to
    the dense one's (KL divergence), at a price on every byte that is read. The price follows the share that is read,
    so that the share of block weights dropped on calibration text is `sparsity`. All weights are frozen. At serving
    time it reads what thresholds and biases read, and runs through the column kernels.

    steps: of training, each on `batch` calibration windows, which are drawn in shuffled passes over the text.
    level_rate, offset_rate, constant_rate: learning rates of AdamW, rising over the first steps and falling to zero by
        a cosine; what has a rate of 0 stays. The defaults are for some dozen steps; over hundreds channels find their
        levels themselves, and a level_rate of 0 is better.
    """

    steps: int = 64
    batch: int = 1
    level_rate: float = 0.03
    offset_rate: float = 0.01
    constant_rate: float = 0.002

    name: ClassVar[str] = "combined"
    paper: ClassVar[str] = "-"
    version: ClassVar[int] = 2
    needs: ClassVar[str] = "calibration"
    compensated: ClassVar[bool] = True
    fit_fields: ClassVar[tuple[str, ...]] = (
        "sparsity", "steps", "batch", "level_rate", "offset_rate", "constant_rate"
    )  # fmt: skip

    def __post_init__(self) -> None:
        for field, least in (("steps", 0), ("batch", 1)):
            if not isinstance(value := getattr(self, field), int) or value < least:
                raise ConfigError(f"method.combined.{field} must be a whole number of at least {least}, not {value!r}")
        for field in ("level_rate", "offset_rate", "constant_rate"):
            if not (value := getattr(self, field)) >= 0:
                raise ConfigError(f"method.combined.{field} must be at least 0, not {value!r}")

    @property
    def trains(self) -> bool:
        """It does, unless no step is asked for."""
        return self.steps > 0

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of all seven projections."""
        return channels(self.sparsity)

    def unsupported(self, view: View) -> str | None:
        """Every threshold is trained where the first block lies."""
        if "training" in view.limits:
            return f"{self.name} can't run on {view.name}: {view.limits['training']}"
        return super().unsupported(view)

    def fit(self, view: View, calibration: Calibration) -> State:
        """By projection float32: `cut.P` thresholds [layers, channels], `P` constants [layers, outputs], of the layers
        that have it.

        And `kl` [steps], the loss before each step in nats a token, and `read` [steps], the share of weights read.
        """
        thresholds = Cuts(view, calibration, self.sparsity)
        constants = {(p, n): torch.zeros(m.out_features, device=view.device) for p, n, m in projections(view)}
        groups = [
            {"params": list(parameters.values()), "lr": rate, "betas": BETAS}
            for parameters, rate in (
                (thresholds.levels, self.level_rate),
                (thresholds.offsets, self.offset_rate),
                (constants, self.constant_rate),
            )
        ]
        warm_up = min(WARM_UP, self.steps // 4)
        batches = drawn(calibration, self.steps, self.batch)
        with added(view, constants), thresholds.installed():
            kl = distil(view, batches, groups, thresholds.settle, warm_up) if batches else []
            thresholds.meet(calibration.batches[:2])
        state = {"kl": torch.tensor(kl), "read": torch.tensor(thresholds.read[: len(kl)])}
        for p in view.projection_names():
            layers = [n for n in range(view.n_layers) if (p, n) in constants]
            state[f"cut.{p}"] = torch.stack([thresholds.log_cut(p, n).exp().cpu() for n in layers])
            state[p] = torch.stack([constants[p, n].cpu() for n in layers])
        return state

    def plan(self, view: View, state: State) -> dict[tuple[str, int], dict[str, Thresholds]]:
        """Thresholds [channels] by (site, layer), for each projection, in the model's dtype."""
        cuts = {p: state[f"cut.{p}"].to(view.device, view.dtype) for p in view.projection_names()}
        return {
            (site, layer): {p: Thresholds(cuts[p][layer]) for p in names if layer < len(cuts.get(p, ()))}
            for site, names in PROJECTIONS.items()
            for layer in range(view.n_layers)
        }

    def select(self, plan: dict, site: str, layer: int, x: Tensor, step: Step) -> dict[str, Thresholds]:
        """Static thresholds. x: [batch, tokens, channels]."""
        return plan[site, layer]

    def rewrite(self, view: View, state: State) -> AbstractContextManager[None]:
        """The constants as biases where every token is sparse; else added to the sparse tokens alone."""
        if self.sparsity == 0:
            return nullcontext()
        names = view.projection_names()
        constants = {(p, layer): c for p in names for layer, c in enumerate(state[p].to(view.device, view.dtype))}
        return biased(view, constants) if view.tracker.policy == Policy() else added(view, constants)


def projections(view: View) -> Iterator[tuple[str, int, nn.Linear]]:
    """(projection, layer, module) of every projection of a model."""
    for layer, block in enumerate(view.blocks):
        for name, module in block.projections():
            yield name, layer, module


def drawn(calibration: Calibration, steps: int, batch: int) -> list[Tensor]:
    """`steps` batches [batch, length] of calibration windows: shuffled passes, each window once a pass."""
    windows = torch.cat(calibration.batches)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat(
        [torch.randperm(len(windows), generator=generator) for _ in range(-(-steps * batch // len(windows)))]
        or [torch.empty(0, dtype=torch.long)]
    )
    return [windows[order[i * batch : (i + 1) * batch].to(windows.device)] for i in range(steps)]


class Cuts:
    """Thresholds in training, and the price of reading that keeps them at a budget.

    levels [1] and offsets [channels], float32 by (projection, layer): their sum is log t. read: the share of weights
    read in each forward pass of the sparse model.
    """

    def __init__(self, view: View, calibration: Calibration, sparsity: float) -> None:
        self.view, self.sparsity = view, sparsity
        self.modules = {(name, layer): module for name, layer, module in projections(view)}
        self.total = sum(module.weight.numel() for module in self.modules.values())
        quantiles = {site: Quantiles(view.n_layers) for site in PROJECTIONS}
        calibration.visit({site: quantiles[site].see for site in PROJECTIONS})
        grids = {p: quantiles[site].grid() for site, names in PROJECTIONS.items() for p in names}
        self.levels: dict[Key, Tensor] = {}
        self.offsets: dict[Key, Tensor] = {}
        for (name, layer), module in self.modules.items():
            cut = max(Quantiles.at(grids[name][layer], sparsity), LEAST)
            self.levels[name, layer] = torch.tensor([cut], device=view.device).log()
            self.offsets[name, layer] = torch.zeros(module.in_features, device=view.device)
        self.price, self._integral = 0.0, 1.0  # nats a token for all reads; the same in units of the loss
        self.read: list[float] = []
        self._kept: list[Tensor] = []
        self._slopes: dict[Key, Tensor] = {}

    def log_cut(self, name: str, layer: int) -> Tensor:
        """log t of a projection, [channels]."""
        return self.levels[name, layer] + self.offsets[name, layer]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Every projection sees its input cut, on passes whose tokens are all sparse, until the context ends."""

        def hook_of(key: Key):  # noqa: ANN202 (a torch hook)
            def hook(_m: nn.Module, args: tuple) -> tuple | None:
                step = self.view.tracker.step
                if step is not None and step.sparse is not None:
                    return None
                x = Cut.apply(args[0], self.log_cut(*key), self, key)
                return (x, *args[1:])

            return hook

        with ExitStack() as stack:
            for key, module in self.modules.items():
                stack.callback(module.register_forward_pre_hook(hook_of(key)).remove)
            yield

    def share(self, key: Key) -> float:
        """Of all weights, those that one kept input of a projection reads."""
        return self.modules[key].out_features / self.total

    def saw(self, key: Key, kept: Tensor) -> None:
        """Note what a projection's kept inputs read. kept: bool [..., channels]."""
        self._kept.append(kept.sum() * self.share(key))

    def sloped(self, key: Key, slope: Tensor) -> None:
        """Note by how much fewer inputs are kept as log t rises, summed over tokens, float32 [channels]."""
        self._slopes[key] = self._slopes[key] + slope if key in self._slopes else slope

    def settle(self, loss: float, tokens: int) -> None:
        """Set the price of a read by what this step read and lost (nats a token), and add its pull to the gradients.

        A controller, proportional plus integral, in units of the loss: what a read is worth scales with it.
        """
        self.read.append(float(torch.stack(self._kept).sum()) / tokens)
        over = self.read[-1] - (1 - self.sparsity)
        self._integral = max(0.0, self._integral + 4 * over)
        self.price = loss * max(0.0, self._integral + 80 * over)
        for key, slope in self._slopes.items():
            pull = slope * (-self.price * self.share(key) / tokens)
            for parameter, own in ((self.offsets[key], pull), (self.levels[key], pull.sum(0, keepdim=True))):
                parameter.grad = own if parameter.grad is None else parameter.grad + own
        self._kept.clear()
        self._slopes.clear()

    @torch.no_grad()
    def meet(self, batches: list[Tensor], rounds: int = 2) -> None:
        """Move all levels together, so that exactly the budget is read on these windows: a tail of the training.

        What is cut in one layer changes the inputs of those behind it a little, hence more than one round.
        """
        for _ in range(rounds):
            found = Histogram()
            with found.over(self):
                Calibration(self.view, batches).visit({})
            shift = found.quantile(self.sparsity)
            for level in self.levels.values():
                level += shift
        self._kept.clear()


class Histogram:
    """How the share of weights read falls as all thresholds rise together: weights by log|x| - log t."""

    def __init__(self, reach: float = 3.0, bins: int = 6000) -> None:
        self.reach, self.counts = reach, torch.zeros(bins, dtype=torch.float64)

    @contextmanager
    def over(self, cuts: Cuts) -> Iterator[None]:
        """Count what every projection of `cuts` sees (before it is cut) until the context ends."""

        def hook_of(key: Key, weight: float):  # noqa: ANN202 (a torch hook)
            def hook(_m: nn.Module, args: tuple) -> None:
                # Counted where it lies: of a billion weights these are gigabytes a layer.
                z = distance(args[0], cuts.log_cut(*key)).flatten()
                places = ((z + self.reach) / (2 * self.reach) * len(self.counts)).long()
                counted = torch.bincount(places.clamp(0, len(self.counts) - 1), minlength=len(self.counts))
                self.counts += counted.cpu() * (weight / z.numel())

            return hook

        with ExitStack() as stack:
            for key, module in cuts.modules.items():
                hook = module.register_forward_pre_hook(hook_of(key, module.weight.numel()), prepend=True)
                stack.callback(hook.remove)
            yield

    def quantile(self, share: float) -> float:
        """The rise of all log t at which `share` of the weights are dropped."""
        below = self.counts.cumsum(0)
        place = int(torch.searchsorted(below, share * below[-1]))
        return (place + 0.5) / len(self.counts) * 2 * self.reach - self.reach


def distance(x: Tensor, log_cut: Tensor) -> Tensor:
    """log|x| - log t, float32; above 0 where x is kept. x: [..., channels]; log_cut: [channels]."""
    return x.detach().float().abs().clamp_min(LEAST).log_() - log_cut


class Cut(torch.autograd.Function):
    """x where |x| > t, else 0; for t the slope of a logistic step of WIDTH in log|x| stands in for the jump's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_cut: Tensor, cuts: Cuts, key: Key) -> Tensor:  # noqa: D102
        z = distance(x, log_cut)
        kept = z > 0
        cuts.saw(key, kept)
        ctx.save_for_backward(x, z.to(x.dtype))
        ctx.cuts, ctx.key = cuts, key
        return x * kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # noqa: D102
        x, z = ctx.saved_tensors
        to_cut = None
        if ctx.needs_input_grad[1]:
            step = torch.sigmoid(z.float() / WIDTH)
            slope = (step * (1 - step) / WIDTH).flatten(0, -2)
            # Raising log t by d drops slope * d of a channel: that much less of the loss's pull, and of what is read.
            to_cut = -((gradient.float() * x.float()).flatten(0, -2) * slope).sum(0)
            ctx.cuts.sloped(ctx.key, slope.sum(0))
        return gradient * (z > 0), to_cut, None, None
