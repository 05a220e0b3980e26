"""MoEfication: experts carved out of a dense MLP, and a router that picks some for each token (arXiv 2110.01786)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.sees import INPUT, OUTPUT, Sees
from harness.model.selection import Mask, keep_mask
from harness.model.step import Step
from harness.model.view import View
from harness.progress import track
from methods import experts
from methods.topk import best, of_position, random_table

SPLITS = ("kmeans", "coactivation")
ROUTERS = ("mlp", "similarity", "oracle", "random")
LEARNING_RATE, BATCH, HELD_OUT = 0.01, 512, 0.1  # of the released code
COACTIVE_SHARE = 0.25  # neurons that count as active where no ReLU says so
COACTIVE_TOKENS = 8192  # tokens that the co-activation graph is made from, at most


@dataclass(frozen=True)
class MoEfication(Method):
    """Keeps, for each token, the experts that a router scores highest; k comes from the sparsity.

    split: kmeans (balanced, on normalised gate rows; up rows in a plain MLP) or coactivation (graph partition).
    router: mlp (two trained layers, started from the centroids), similarity (dot product of the normalised input with
        an expert's centroid), oracle (the true sums of activation), random (the floor).
    expert_size: neurons an expert. epochs: of the mlp router.
    """

    split: Literal["kmeans", "coactivation"] = "kmeans"
    router: Literal["mlp", "similarity", "oracle", "random"] = "mlp"
    expert_size: int = 32
    epochs: int = 30
    seed: int = 0

    name: ClassVar[str] = "moefication"
    paper: ClassVar[str] = "arXiv 2110.01786"
    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        for key, known in (("split", SPLITS), ("router", ROUTERS)):
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"method.moefication.{key} must be one of {', '.join(known)}, not {getattr(self, key)!r}"
                )
        for key in ("expert_size", "epochs"):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1:
                raise ConfigError(
                    f"method.moefication.{key} must be a whole number of at least 1, not {getattr(self, key)!r}"
                )

    @property
    def trains(self) -> bool:
        """The mlp router."""
        return self.router == "mlp"

    @property
    def oracle(self) -> bool:
        """True sums of activation are known only after the work is done."""
        return self.router == "oracle"

    @property
    def names_neurons(self) -> bool:
        """Experts are made of them."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons; a router sees the MLP's input, the oracle its hidden vector."""
        return {} if self.sparsity == 0 else {"neurons": OUTPUT if self.router == "oracle" else INPUT}

    def unsupported(self, view: View) -> str | None:
        """Experts must divide the neurons."""
        return experts.does_not_divide(view, self.expert_size) or super().unsupported(view)

    def fit_key(self) -> dict[str, Any]:
        """Only the mlp router is trained; the others share one fit."""
        key = super().fit_key() | {"split": self.split, "expert_size": self.expert_size, "seed": self.seed}
        return key | ({"router": "mlp", "epochs": self.epochs} if self.router == "mlp" else {})

    def fit(self, view: View, calibration: Calibration) -> State:
        """`expert_of` int64 [layers, neurons]; float32 `centroids` [layers, experts, d_model]; resumable by layer.

        With the mlp router also `first` [layers, experts, d_model], `second` [layers, experts, experts] and `captured`
        [layers, experts]: the share of activation that the k best hold on held-out tokens, k = 1 ... experts.
        """
        splits = split_layers(view, calibration, self.split, self.expert_size, self.seed)
        state = {
            "expert_of": torch.stack(splits),
            "centroids": torch.stack(
                [experts.centroids(experts.first_rows(b), s).cpu() for b, s in zip(view.blocks, splits, strict=True)]
            ),
        }
        if self.router != "mlp":
            return state
        inputs: list[list[Tensor]] = [[] for _ in view.blocks]
        sums: list[list[Tensor]] = [[] for _ in view.blocks]
        of = [experts.Sums(split) for split in splits]
        calibration.visit(
            {
                "mlp_in": lambda layer, x: inputs[layer].append(x.flatten(0, 1).clone()),
                "mlp_hidden": lambda layer, x: sums[layer].append(of[layer].of(x.flatten(0, 1))),
            }
        )
        parts = [
            calibration.scratch.part(
                f"router-{layer:03d}",
                lambda layer=layer: train_router(
                    torch.cat(inputs[layer]),
                    torch.cat(sums[layer]),
                    state["centroids"][layer].to(view.device),
                    self.epochs,
                    seed=1000 * self.seed + layer,
                ),
            )
            for layer in track(range(view.n_layers), "training routers")
        ]
        return state | {key: torch.stack([part[key] for part in parts]) for key in parts[0]}

    def plan(self, view: View, state: State) -> Plan:
        """The split, and the router in the model's dtype."""
        if state["expert_of"].shape != (view.n_layers, view.d_ff):
            layers, neurons = state["expert_of"].shape
            raise ConfigError(
                f"the experts were made for {layers} blocks of {neurons} neurons, "
                f"and {view.name} has {view.n_layers} of {view.d_ff}"
            )
        names = {"mlp": ("first", "second"), "similarity": ("centroids",)}.get(self.router, ())
        n_experts = view.d_ff // self.expert_size
        table = None
        if self.router == "random":
            generator = torch.Generator().manual_seed(self.seed)
            table = torch.stack([random_table(n_experts, generator) for _ in view.blocks]).to(view.device)
        return Plan(
            expert_of=state["expert_of"].to(view.device),
            sums=[experts.Sums(split) for split in state["expert_of"]],
            weights=[state[name].to(view.device, view.dtype) for name in names],
            table=table,
        )

    def score(self, plan: Plan, site: str, layer: int, x: Tensor, step: Step) -> Tensor:
        """Each neuron's score [batch, tokens, neurons], its expert's, from what `select` sees."""
        return self.expert_scores(plan, layer, x, step)[..., plan.expert_of[layer]]

    def expert_scores(self, plan: Plan, layer: int, x: Tensor, step: Step) -> Tensor:
        """Scores of experts [batch, tokens, experts] from what `select` sees."""
        if plan.table is not None:
            return of_position(plan.table[layer], step)
        if self.router == "oracle":
            return plan.sums[layer].of(x)
        return route(x, *(weight[layer] for weight in plan.weights))

    def select(self, plan: Plan, site: str, layer: int, x: Tensor, step: Step) -> Mask:
        """The neurons of the k best experts. x: [batch, tokens, d_model], or the hidden vector for the oracle."""
        scores = self.expert_scores(plan, layer, x, step)
        return Mask(keep_mask(best(scores, self.sparsity), scores)[..., plan.expert_of[layer]])

    def usage(self, view: View, state: State, batches: Iterable[Tensor]) -> Tensor:
        """By what the experts hold, whatever the router: see `experts.frequencies`."""
        return experts.frequencies(view, state["expert_of"], batches)

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """The router's own weights."""
        names = {"mlp": ("first", "second"), "similarity": ("centroids",)}.get(self.router, ())
        return {"mlp": sum(state[name].numel() for name in names)}


@dataclass(frozen=True, eq=False)
class Plan:
    """By layer: expert_of int64 [neurons], sums, the router's matrices, random scores [PERIOD, experts]."""

    expert_of: Tensor
    sums: list[experts.Sums]
    weights: list[Tensor]
    table: Tensor | None


def split_layers(view: View, calibration: Calibration, split: str, size: int, seed: int) -> list[Tensor]:
    """`expert_of` of every layer, resumable by layer."""
    counts = coactivations(view, calibration) if split == "coactivation" else None

    def make(layer: int) -> State:
        if counts is not None:
            return {"expert_of": experts.by_coactivation(counts[layer], size, seed)}
        return {"expert_of": experts.by_kmeans(experts.first_rows(view.blocks[layer]), size, seed)}

    return [
        calibration.scratch.part(f"split-{layer:03d}", lambda layer=layer: make(layer))["expert_of"]
        for layer in track(range(view.n_layers), "splitting neurons into experts")
    ]


def coactivations(view: View, calibration: Calibration) -> list[Tensor]:
    """For every layer float32 [neurons, neurons]: the number of tokens in which both neurons are active."""
    natural = experts.natural_zeros(view)
    counts = [torch.zeros(view.d_ff, view.d_ff, device=view.device) for _ in view.blocks]
    seen = [0] * view.n_layers

    def see(layer: int, x: Tensor) -> None:
        both = experts.active(x.flatten(0, 1)[: COACTIVE_TOKENS - seen[layer]], COACTIVE_SHARE, natural).float()
        seen[layer] += len(both)
        counts[layer] += both.T @ both

    calibration.visit({"mlp_hidden": see})
    return counts


def route(x: Tensor, first: Tensor, second: Tensor | None = None) -> Tensor:
    """Scores of experts [..., experts] from the MLP's input x [..., d_model].

    first: [experts, d_model]; alone it is the similarity router. second: [experts, experts], after a tanh.
    """
    return _layers(F.normalize(x.float(), dim=-1).to(first.dtype), first, second)


def _layers(x: Tensor, first: Tensor, second: Tensor | None) -> Tensor:
    scores = F.linear(x, first)
    return scores if second is None else F.linear(scores.tanh(), second)


def train_router(x: Tensor, sums: Tensor, centroids: Tensor, epochs: int, seed: int) -> State:
    """Train a router on inputs x [tokens, d_model] towards sums [tokens, experts] divided by the token's largest.

    The released code divides by the batch's largest; in a LLaMA that is one token's massive activation, beside which
    all targets vanish. Binary cross-entropy on logits, Adam, the last tenth of the tokens held out; the epoch is kept
    whose router captures most activation there, in the mean over all k. Epoch 0 ranks as the similarity router does, so
    that is the least that comes out. Deterministic by seed.
    """
    x = F.normalize(x.float(), dim=-1)
    cut = len(x) - max(1, round(len(x) * HELD_OUT))
    generator = torch.Generator().manual_seed(seed)
    best: State = {}
    with torch.enable_grad():
        first = centroids.clone().requires_grad_()
        second = torch.eye(len(centroids), device=x.device).requires_grad_()
        optimizer = torch.optim.Adam([first, second], lr=LEARNING_RATE)
        for epoch in range(epochs + 1):
            batches = torch.randperm(cut, generator=generator).to(x.device).split(BATCH) if epoch else ()
            for rows in batches:
                target = sums[rows] / sums[rows].amax(-1, keepdim=True).clamp(min=1e-12)
                loss = F.binary_cross_entropy_with_logits(_layers(x[rows], first, second), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                share = experts.captured(_layers(x[cut:], first, second), sums[cut:])
            if not best or share.mean() > best["captured"].mean():
                best = {"first": first.detach().clone(), "second": second.detach().clone(), "captured": share}
    return best
