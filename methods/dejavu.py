"""DejaVu: low-rank predictors choose neurons and heads for each token before they are computed (arXiv 2310.17157)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import State
from harness.fitting.calibration import Calibration
from harness.fitting.contribution import Contributions
from harness.model.sees import INPUT, OUTPUT, Sees, residual
from harness.model.selection import Mask, SiteSelection, keep_mask
from harness.model.step import Step
from harness.model.view import View
from harness.progress import track
from methods.predictors import train, unit_rms
from methods.topk import Scored, best, of_position, random_table

SITES = {"mlp": ("neurons",), "heads": ("heads",), "both": ("neurons", "heads")}
PART = {"neurons": "mlp", "heads": "attn"}
FLOOR = {"neurons": 0.005, "heads": 0.0}  # added to the negative weight of the loss
GRID = 1001  # quantiles of the scores that are kept for select=score


@dataclass(frozen=True)
class DejaVu(Scored):
    """Keeps, for each token, the neurons and heads that a predictor scores highest (sections 3 and 4).

    targets: mlp (neurons), heads, or both. A head that is not kept loses its output; its K and V are still made.
    predictor: serial (sees the sublayer's own normed input), lookahead (sees the residual stream before the norm,
        earlier), oracle (the labels' own scores: what perfect prediction would give), random (the floor).
    lookahead: how early. 1 is the paper's: heads from the input of the block before, neurons from the input of their
        own block, before attention; each further one is a block earlier. The first blocks see the first block's input.
        Unlike in the released code, the predictor of neurons is trained on what it is fed later.
    select_by: topk (the same number for every token) or score (a threshold a layer on the score: its quantile on
        held-out calibration tokens, so the number varies by token).
    rank: inner width of a predictor. Two linear maps without a non-linearity are one: where one is smaller, it is kept.
    epochs: at most so many; training stops early on held-out recall.
    label_density: share of neurons (and heads) called active in training, by top-k of
        |act(gate) * up| * ||W_down column|| and of the head's output norm. The neurons of a ReLU model are labelled
        by being non-zero instead.
    """

    targets: Literal["mlp", "heads", "both"] = "both"
    predictor: Literal["serial", "lookahead", "oracle", "random"] = "serial"
    lookahead: int = 1
    select_by: Literal["topk", "score"] = "topk"
    rank: int = 128
    epochs: int = 6
    label_density: float = 0.5
    seed: int = 0

    name: ClassVar[str] = "dejavu"
    paper: ClassVar[str] = "arXiv 2310.17157"
    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        for key, known in (
            ("targets", tuple(SITES)),
            ("predictor", ("serial", "lookahead", "oracle", "random")),
            ("select_by", ("topk", "score")),
        ):
            if getattr(self, key) not in known:
                raise ConfigError(f"method.dejavu.{key} must be one of {', '.join(known)}, not {getattr(self, key)!r}")
        for key in ("lookahead", "rank", "epochs"):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1:
                raise ConfigError(
                    f"method.dejavu.{key} must be a whole number of at least 1, not {getattr(self, key)!r}"
                )
        if not 0 < self.label_density < 1:
            raise ConfigError(f"method.dejavu.label_density must lie between 0 and 1, not {self.label_density}")
        if self.select_by == "score" and not self.learns:
            raise ConfigError(
                f"method.dejavu.select_by=score needs a trained predictor, not predictor={self.predictor}"
            )

    @property
    def learns(self) -> bool:
        """Whether there is a predictor to train."""
        return self.predictor in ("serial", "lookahead")

    @property
    def trains(self) -> bool:
        """Its predictors."""
        return self.learns

    @property
    def oracle(self) -> bool:
        """The labels' own scores are known only after the work is done."""
        return self.predictor == "oracle"

    @property
    def names_neurons(self) -> bool:
        """Its predictors do."""
        return "neurons" in SITES[self.targets]

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons and heads, and what the predictor of each sees."""
        return {} if self.sparsity == 0 else {site: self._sees(site) for site in SITES[self.targets]}

    def _sees(self, site: str) -> Sees:
        if self.predictor == "lookahead":
            return residual(self.distance(site))
        return OUTPUT if self.predictor == "oracle" else INPUT

    def distance(self, site: str) -> int:
        """How many blocks earlier a look-ahead predictor looks."""
        return self.lookahead - (site == "neurons")

    def unsupported(self, view: View) -> str | None:
        """Look-ahead must stay inside the model."""
        if self.predictor == "lookahead" and self.lookahead >= view.n_layers:
            return f"dejavu cannot look {self.lookahead} blocks ahead in the {view.n_layers} blocks of {view.name}"
        return super().unsupported(view)

    def fit_key(self) -> dict[str, Any]:
        """What the trained predictors depend on: the sparsity and the rule of selection are not among it."""
        key = super().fit_key() | {"predictor": self.predictor}
        if not self.learns:
            return key
        names = ("targets", "rank", "epochs", "label_density", "seed")
        key |= {name: getattr(self, name) for name in names}
        return key | ({"lookahead": self.lookahead} if self.predictor == "lookahead" else {})

    def fit(self, view: View, calibration: Calibration) -> State:
        """Predictors of every layer; resumable by layer.

        By site S, float32: S.down [layers, rank, d_model] and S.up [layers, n, rank], or S.whole [layers, n, d_model]
        where that is smaller; S.scores [layers, 1001], quantiles of held-out scores; S.recall [layers], held out.
        """
        if not self.learns:
            return {}
        inputs, labels = self._examples(view, calibration)
        state: State = {}
        for site in SITES[self.targets]:
            layers = []
            for layer in track(range(view.n_layers), f"training predictors of {site}"):
                x = inputs[site](layer)
                layers.append(
                    calibration.scratch.part(
                        f"{site}-{layer:03d}",
                        lambda x=x, site=site, layer=layer: self._train(x, labels[site][layer], site, layer),
                    )
                )
            state |= {f"{site}.{key}": torch.stack([part[key] for part in layers]) for key in layers[0]}
        return state

    def _examples(
        self, view: View, calibration: Calibration
    ) -> tuple[dict[str, Callable[[int], Tensor]], dict[str, list[Tensor]]]:
        """By site: the predictor's input of a layer [tokens, d_model], and labels bool [tokens, n] of every layer."""
        true, natural = Contributions(view), "relu" in view.activation.lower()
        sources = {"neurons": ("mlp_in", "mlp_hidden"), "heads": ("attn_in", "attn_out")}
        seen: dict[str, list[list[Tensor]]] = {}
        marked: dict[str, list[list[Tensor]]] = {}

        def keep(layer: int, x: Tensor, into: list[list[Tensor]]) -> None:
            into[layer].append(x.flatten(0, 1).clone())

        def mark(layer: int, x: Tensor, site: str) -> None:
            score = true.of(site, layer, x.flatten(0, 1))
            if natural and site == "neurons":
                marked[site][layer].append(score > 0)
                return
            marked[site][layer].append(keep_mask(best(score, 1 - self.label_density), score))

        visits: dict[str, Callable[[int, Tensor], None]] = {}
        for site in SITES[self.targets]:
            point = "residual" if self.predictor == "lookahead" else sources[site][0]
            seen[point] = [[] for _ in view.blocks]
            marked[site] = [[] for _ in view.blocks]
            visits[point] = lambda layer, x, point=point: keep(layer, x, seen[point])
            visits[sources[site][1]] = lambda layer, x, site=site: mark(layer, x, site)
        calibration.visit(visits)

        def inputs_of(site: str) -> Callable[[int], Tensor]:
            if self.predictor == "lookahead":
                return lambda layer: torch.cat(seen["residual"][max(0, layer - self.distance(site))])
            return lambda layer: torch.cat(seen[sources[site][0]][layer])

        labels = {site: [torch.cat(parts) for parts in layers] for site, layers in marked.items()}
        return {site: inputs_of(site) for site in SITES[self.targets]}, labels

    def _train(self, x: Tensor, labels: Tensor, site: str, layer: int) -> State:
        made = train(unit_rms(x), labels, self.rank, self.epochs, FLOOR[site], seed=1000 * self.seed + layer)
        (rank, d), n = made.down.shape, len(made.up)
        weights = {"whole": made.up @ made.down} if n * d <= rank * (n + d) else {"down": made.down, "up": made.up}
        scores = made.held_out.flatten().sort().values
        at = torch.linspace(0, len(scores) - 1, GRID, device=scores.device).long()
        return weights | {"scores": scores[at], "recall": torch.tensor(made.recall)}

    def plan(self, view: View, state: State) -> Plan:
        """The predictors in the model's dtype, and from which score on to keep."""
        plan = Plan(Contributions(view))
        generator = torch.Generator().manual_seed(self.seed)
        for site in self.sites:
            n = view.d_ff if site == "neurons" else view.n_heads
            for layer in range(view.n_layers):
                if self.learns:
                    plan.weights[site, layer] = [w[layer].to(view.device, view.dtype) for w in _weights(state, site)]
                    grid = state[f"{site}.scores"][layer]
                    plan.cut[site, layer] = torch.lerp(*_around(grid, self.sparsity)).item()
                elif self.predictor == "random":
                    plan.random[site, layer] = random_table(n, generator).to(view.device)
        return plan

    def score(self, plan: Plan, site: str, layer: int, x: Tensor, step: Step) -> Tensor:
        """Scores [batch, tokens, n], larger for what is likelier active, from what `select` sees."""
        if self.predictor == "random":
            return of_position(plan.random[site, layer], step)
        if self.predictor == "oracle":
            return plan.true.of(site, layer, x)
        x = unit_rms(x)
        for weight in plan.weights[site, layer]:
            x = F.linear(x, weight)
        return x

    def select(self, plan: Plan, site: str, layer: int, x: Tensor, step: Step) -> SiteSelection:
        """Top-k or all above the layer's cut. x: [batch, tokens, d_model], or at the oracle the sublayer's product."""
        if self.select_by == "score":
            return Mask(self.score(plan, site, layer, x, step) > plan.cut[site, layer])
        return super().select(plan, site, layer, x, step)

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """The predictors' own weights."""
        return {PART[site]: sum(w.numel() for w in _weights(state, site)) for site in self.sites if self.learns}


class Plan:
    """What `select` needs: by (site, layer) the predictor's matrices, its cut, or random scores."""

    def __init__(self, true: Contributions) -> None:
        self.true = true
        self.weights: dict[tuple[str, int], list[Tensor]] = {}
        self.cut: dict[tuple[str, int], float] = {}
        self.random: dict[tuple[str, int], Tensor] = {}


def _weights(state: State, site: str) -> Iterator[Tensor]:
    """The matrices of a site's predictors in the order of use, each [layers, out, in]."""
    return (state[key] for part in ("whole", "down", "up") if (key := f"{site}.{part}") in state)


def _around(grid: Tensor, level: float) -> tuple[Tensor, Tensor, float]:
    """The two points of a quantile grid around a level, and how far between them it lies."""
    place = level * (len(grid) - 1)
    below = min(int(place), len(grid) - 2)
    return grid[below], grid[below + 1], place - below
