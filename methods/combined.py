"""Combined: thresholds of all projections learnt together under one byte budget, with constants for what they drop.

Our own. What it joins: static magnitude thresholds (TEAL), a budget that goes where it hurts least, here by gradients
and down to single channels, SPON's constants and, where asked for, neurons that a copy in few bits chooses (Prox).
Norms of columns are not needed: a threshold of its own says as much about a channel. Left out after trials: a gain for
every input and a narrower step brought nothing. A low-rank update of the weights, merged, brought a hundredth of the
perplexity, but they would no longer be the dense model's, nor quantised weights be what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from harness.errors import ConfigError, UnsupportedError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.inputs import Inputs
from harness.fitting.quantiles import Quantiles
from harness.model.few_bits import Copy
from harness.model.sees import INPUT, Sees
from harness.model.selection import PROJECTIONS, Mask, SiteSelection, Thresholds
from harness.model.step import Policy, Step
from harness.model.view import View
from methods.distillation import Teacher, distil
from methods.prox import WEIGHT_BITS, Prox
from methods.spon import added, biased
from methods.topk import channels

Key = tuple[str, int]  # projection or "neurons", layer
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

    With `bits` the MLP has no thresholds on its inputs: neuron i runs, whole and exactly, where what Prox's copy of
    gate and up gives for |u_i * act(g_i)| exceeds t_i, a threshold of its own that is trained like the others. What is
    read of the copy is made up for, so that `sparsity` holds with it.

    bits: of that copy, of whose inputs half are read; 0: none, and thresholds on the inputs of all seven projections.
    steps: of training, each on `batch` calibration windows, which are drawn in shuffled passes over the text.
    level_rate, offset_rate, constant_rate: learning rates of AdamW, rising over the first steps and falling to zero by
        a cosine; what has a rate of 0 stays. The defaults are for some dozen steps; over hundreds channels find their
        levels themselves, and a level_rate of 0 is better.
    """

    bits: int = 0
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
        "sparsity", "bits", "steps", "batch", "level_rate", "offset_rate", "constant_rate"
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not (self.bits == 0 or 2 <= self.bits <= WEIGHT_BITS):
            raise ConfigError(f"method.combined.bits must be 0 or from 2 to {WEIGHT_BITS}, not {self.bits!r}")
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
    def copying(self) -> Prox | None:
        """What makes the copy, and counts it; None without."""
        return Prox(self.sparsity, bits=self.bits) if self.bits else None

    @property
    def names_neurons(self) -> bool:
        """It copies their weights, if any."""
        return self.bits > 0

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of all seven projections; neurons in the place of the MLP's."""
        found = channels(self.sparsity)
        if self.bits and found:
            return {"attn_in": INPUT, "attn_out": INPUT, "neurons": INPUT}
        return found

    def unsupported(self, view: View) -> str | None:
        """Every threshold is trained where the first block lies."""
        if "training" in view.limits:
            return f"{self.name} can't run on {view.name}: {view.limits['training']}"
        return super().unsupported(view)

    def fit(self, view: View, calibration: Calibration) -> State:
        """By projection float32: `cut.P` thresholds [layers, channels], `P` constants [layers, outputs], of the layers
        that have it.

        With a copy, of the MLP: `cut.neurons` [layers, neurons] on what it gives, `copy` [layers] on its inputs, and
        constants of down alone. And `kl` [steps], the loss before each step in nats a token, and `read` [steps], the
        share of weights read, without the copy's.
        """
        state: State = {}
        copies, budget = None, self.sparsity
        batches = drawn(calibration, self.steps, self.batch)
        teacher = Teacher(view, batches)
        inputs = None if self.copying is None else Inputs(calibration)
        grids = quantiles(calibration, teacher, inputs)
        if self.copying is not None and inputs is not None:
            seen, copies = self.copying.learnt(inputs)
            state, grids["neurons"] = {"copy": seen["cut"]}, seen["scores"]
            budget += sum(self.copying.overhead_weights(view, seen).values()) / (view.block_weights * view.n_layers)
            if budget >= 1:
                raise UnsupportedError(
                    f"combined can't skip {self.sparsity:g} beside what its copy reads: {budget:.2f} in all"
                )
        thresholds = Cuts(view, budget, grids, copies)
        constants = {
            (p, n): torch.zeros(m.out_features, device=view.device)
            for p, n, m in projections(view)
            if copies is None or p not in ("gate", "up")
        }
        groups = [
            {"params": list(parameters.values()), "lr": rate, "betas": BETAS}
            for parameters, rate in (
                (thresholds.levels, self.level_rate),
                (thresholds.offsets, self.offset_rate),
                (constants, self.constant_rate),
            )
        ]
        warm_up = min(WARM_UP, self.steps // 4)
        with added(view, constants), thresholds.installed():
            kl = distil(view, batches, groups, thresholds.settle, warm_up, teacher) if batches else []
            thresholds.meet(calibration.batches[:2])
        state |= {"kl": torch.tensor(kl), "read": torch.tensor(thresholds.read[: len(kl)])}
        for name in sorted({name for name, _ in thresholds.gates}):
            state[f"cut.{name}"] = torch.stack(
                [thresholds.log_cut(*key).exp().cpu() for key in thresholds.gates if key[0] == name]
            )
        for name in sorted({name for name, _ in constants}):
            state[name] = torch.stack([constant.cpu() for key, constant in constants.items() if key[0] == name])
        return state

    def plan(self, view: View, state: State) -> dict[tuple[str, int], Any]:
        """By (site, layer): thresholds [channels] for each projection, in the model's dtype; of neurons the copy and
        theirs.
        """
        cuts = {key[4:]: cut.to(view.device, view.dtype) for key, cut in state.items() if key.startswith("cut.")}
        plan: dict[tuple[str, int], Any] = {
            (site, layer): {p: Thresholds(cuts[p][layer]) for p in names if layer < len(cuts.get(p, ()))}
            for site, names in PROJECTIONS.items()
            if site in self.sites
            for layer in range(view.n_layers)
        }
        if self.copying is not None:
            copies = self.copying.copies(view, state["copy"])
            plan |= {("neurons", n): (copy, cuts["neurons"][n]) for n, copy in enumerate(copies)}
        return plan

    def select(self, plan: dict, site: str, layer: int, x: Tensor, step: Step) -> SiteSelection:
        """Static thresholds, on x or on what the copy makes of it. x: [batch, tokens, channels]."""
        if site != "neurons":
            return plan[site, layer]
        copy, cut = plan[site, layer]
        return Mask(~(copy.score(x) <= cut))

    def guesses(self, view: View, plan: dict) -> Mapping[int, tuple[Copy, Tensor]]:
        """With a copy: it and the neurons' thresholds, of every layer."""
        return {layer: found for (site, layer), found in plan.items() if site == "neurons"}

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """What is read of the copy, in weights of 16 bits."""
        return {} if self.copying is None else self.copying.overhead_weights(view, {})

    def rewrite(self, view: View, state: State) -> AbstractContextManager[None]:
        """The constants as biases where every token is sparse; else added to the sparse tokens alone."""
        if self.sparsity == 0:
            return nullcontext()
        constants = {
            (p, layer): c
            for p in view.projection_names()
            if p in state
            for layer, c in enumerate(state[p].to(view.device, view.dtype))
        }
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


def quantiles(calibration: Calibration, teacher: Teacher, inputs: Inputs | None = None) -> dict[str, Tensor]:
    """Of the inputs, float32 [layers, grid] by projection, in one pass: with `inputs`, which see theirs, not the MLP's.

    The pass teaches as well where it is the dense model's. In 16 bits it doesn't: rounding depends on how many windows
    pass at once, and should be as the student's.
    """
    view = calibration.view
    sites = [site for site in PROJECTIONS if inputs is None or site.startswith("attn")]
    found = {site: Quantiles(view.n_layers) for site in sites}
    see: dict[str, Callable[[int, Tensor], None]] = {site: found[site].see for site in sites}
    if inputs is not None:
        see["mlp_in"] = inputs.see
    teaches = calibration.bare and view.dtype == torch.float32
    calibration.visit(see, teacher.learn if teaches else None)
    return {p: found[site].grid() for site in sites for p in PROJECTIONS[site]}


class Gate(NamedTuple):
    """Where a threshold acts: the inputs of a module, each of which reads so many weights."""

    module: nn.Linear
    weights: int  # that one kept entry reads
    copy: Copy | None  # that scores the entries; None: their magnitude does


def gates(view: View, copies: list[Copy] | None) -> dict[Key, Gate]:
    """All places of thresholds: projections, those of the MLP as one, in neurons, where there are copies."""
    found = {(name, n): Gate(m, m.out_features, None) for name, n, m in projections(view)}
    for n, copy in enumerate(copies or ()):
        parts = [found.pop((p, n)).module for p in ("gate", "up", "down") if (p, n) in found]
        weights = sum(m.weight.numel() for m in parts) // view.blocks[n].down.in_features
        found["neurons", n] = Gate(view.blocks[n].down, weights, copy)
    return found


class Cuts:
    """Thresholds in training, and the price of reading that keeps them at a budget.

    levels [1] and offsets [channels], float32 by (projection or "neurons", layer): their sum is log t. read: the share
    of weights read in each forward pass of the sparse model. grids: float32 [layers, grid] by name, quantiles of what
    the thresholds see. copies: of every layer, or none.
    """

    def __init__(
        self,
        view: View,
        sparsity: float,
        grids: Mapping[str, Tensor],
        copies: list[Copy] | None = None,
    ) -> None:
        self.view, self.sparsity = view, sparsity
        self.gates = gates(view, copies)
        self.total = sum(module.weight.numel() for _, _, module in projections(view))
        self.levels: dict[Key, Tensor] = {}
        self.offsets: dict[Key, Tensor] = {}
        for (name, layer), gate in self.gates.items():
            cut = max(Quantiles.at(grids[name][layer], sparsity), LEAST)
            self.levels[name, layer] = torch.tensor([cut], device=view.device).log()
            self.offsets[name, layer] = torch.zeros(gate.module.in_features, device=view.device)
        self.price, self._integral = 0.0, 1.0  # nats a token for all reads; the same in units of the loss
        self.read: list[float] = []
        self._scores: dict[int, Tensor] = {}  # by layer, what the copy gave in this pass
        self._kept: list[Tensor] = []
        self._slopes: dict[Key, Tensor] = {}

    def log_cut(self, name: str, layer: int) -> Tensor:
        """log t, [channels]."""
        return self.levels[name, layer] + self.offsets[name, layer]

    def distance(self, key: Key, x: Tensor) -> Tensor:
        """How far the entries of x [..., channels] lie above their thresholds, in logarithms, float32."""
        scores = x if self.gates[key].copy is None else self._scores[key[1]]
        return distance(scores, self.log_cut(*key)).view(x.shape)

    @contextmanager
    def seeing(self) -> Iterator[None]:
        """Let the copies score what the MLPs are given, on passes whose tokens are all sparse."""

        def hook_of(layer: int, copy: Copy):  # noqa: ANN202 (a torch hook)
            def hook(_m: nn.Module, args: tuple) -> None:
                if self._sparse():
                    with torch.no_grad():
                        self._scores[layer] = copy.score(args[0].detach())

            return hook

        with ExitStack() as stack:
            for (_, layer), gate in self.gates.items():
                if gate.copy is not None:
                    block = self.view.blocks[layer]
                    first = block.up if block.gate is None else block.gate
                    stack.callback(first.register_forward_pre_hook(hook_of(layer, gate.copy)).remove)
            yield

    def _sparse(self) -> bool:
        step = self.view.tracker.step
        return step is None or step.sparse is None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """What is below its threshold is cut, on passes whose tokens are all sparse, until the context ends."""

        def hook_of(key: Key):  # noqa: ANN202 (a torch hook)
            def hook(_m: nn.Module, args: tuple) -> tuple | None:
                if not self._sparse():
                    return None
                x = Cut.apply(args[0], self.log_cut(*key), self, key)
                return (x, *args[1:])

            return hook

        with ExitStack() as stack:
            stack.enter_context(self.seeing())
            for key, gate in self.gates.items():
                stack.callback(gate.module.register_forward_pre_hook(hook_of(key)).remove)
            yield

    def share(self, key: Key) -> float:
        """Of all weights, those that one kept entry reads."""
        return self.gates[key].weights / self.total

    def saw(self, key: Key, kept: Tensor) -> None:
        """Note what the kept entries read. kept: bool [..., channels]."""
        self._kept.append(kept.count_nonzero() * self.share(key))

    def sloped(self, key: Key, slope: Tensor) -> None:
        """Note by how much fewer entries are kept as log t rises, summed over tokens, float32 [channels]."""
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
        if self.view.device.type == "cpu":  # where the temporaries of several windows take longer than their products
            batches = [window for batch in batches for window in batch.split(1)]
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
        """Count what every threshold of `cuts` sees (before it cuts) until the context ends."""

        def hook_of(key: Key, weight: float):  # noqa: ANN202 (a torch hook)
            def hook(_m: nn.Module, args: tuple) -> None:
                # Counted where it lies: of a billion weights these are gigabytes a layer.
                z = cuts.distance(key, args[0]).flatten().add_(self.reach).div_(2 * self.reach).mul_(len(self.counts))
                places = z.int().clamp_(0, len(self.counts) - 1)
                counted = torch.bincount(places, minlength=len(self.counts))
                self.counts += counted.cpu() * (weight / z.numel())

            return hook

        with ExitStack() as stack:
            for key, gate in cuts.gates.items():
                weights = gate.weights * gate.module.in_features
                hook = gate.module.register_forward_pre_hook(hook_of(key, weights), prepend=True)
                stack.callback(hook.remove)
            yield

    def quantile(self, share: float) -> float:
        """The rise of all log t at which `share` of the weights are dropped."""
        below = self.counts.cumsum(0)
        place = int(torch.searchsorted(below, share * below[-1]))
        return (place + 0.5) / len(self.counts) * 2 * self.reach - self.reach


def distance(x: Tensor, log_cut: Tensor) -> Tensor:
    """log|x| - log t, float32; above 0 where x is kept. x: [..., channels]; log_cut: [channels]."""
    return x.detach().abs().float().clamp_min_(LEAST).log_().sub_(log_cut.detach())


class Cut(torch.autograd.Function):
    """x where |x| (or its score) exceeds t, else 0; t has a logistic slope of WIDTH in log|x|, not a jump's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_cut: Tensor, cuts: Cuts, key: Key) -> Tensor:  # noqa: D102
        z = cuts.distance(key, x)
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
            step = (z.float() / WIDTH).sigmoid_()  # in place from here: memory is what these cost
            slope = (1 - step).mul_(step).div_(WIDTH).flatten(0, -2)
            # Raising log t by d drops slope * d of a channel: that much less of the loss's pull, and of what is read.
            to_cut = -(gradient.float() * x.float()).flatten(0, -2).mul_(slope).sum(0)
            ctx.cuts.sloped(ctx.key, slope.sum(0))
        return gradient * (z > 0), to_cut, None, None
