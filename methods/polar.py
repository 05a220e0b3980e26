"""Polar Sparsity: of the KV cache each sequence reads the heads that a router picks for its token (2505.14884)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.errors import ConfigError
from harness.execution import kernel_heads, masked_heads
from harness.execution.fused_batch import Router
from harness.execution.masked_heads import Decide
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.sees import INPUT, OUTPUT, Sees
from harness.model.selection import keep_mask, top_k_count
from harness.model.step import Step
from harness.model.view import View
from harness.progress import track
from methods.kv_skip import head_energy
from methods.predictors import train
from methods.topk import best, of_position, random_table

SELECT = ("router", "norm", "random")


@dataclass(frozen=True)
class Polar(Method):
    """Keeps, for every token that is decoded, the KV groups of highest score; no other's cache is read (section 4).

    Without grouped queries a group is a head. K and V of every token are made all the same, so nothing of the cache is
    lost. What is saved are reads of the cache, which a batch does not share: they shrink with no union.

    select_by: router (one linear layer a block on the attention's input), norm (of the groups' outputs, what the router
        is trained to guess: an oracle), or random (the floor).
    dense_layers: first blocks that keep all of their heads. `sparsity` is that of the others.
    label_density: share of a token's groups that count as needed in training, by the norm of their outputs.
    epochs: at most so many; training stops early on held-out recall.

    Departures: the routers are trained with a rate, a batch and epochs for 16 thousand tokens, not 400 thousand; a
    positive label weighs more where they are rare. For the paper's routers of the neurons of ReLU models nest
    `dejavu targets=mlp`.
    """

    select_by: Literal["router", "norm", "random"] = "router"
    dense_layers: int = 1
    label_density: float = 0.5
    epochs: int = 20
    seed: int = 0

    name: ClassVar[str] = "polar"
    paper: ClassVar[str] = "arXiv 2505.14884"
    needs: ClassVar[str] = "calibration"
    phases: ClassVar[tuple[str, ...]] = ("decode",)

    def __post_init__(self) -> None:
        if self.select_by not in SELECT:
            raise ConfigError(f"method.polar.select_by must be one of {', '.join(SELECT)}, not {self.select_by!r}")
        for key, least in (("dense_layers", 0), ("epochs", 1)):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < least:
                raise ConfigError(
                    f"method.polar.{key} must be a whole number of at least {least}, not {getattr(self, key)!r}"
                )
        if not 0 < self.label_density < 1:
            raise ConfigError(f"method.polar.label_density must lie between 0 and 1, not {self.label_density}")

    @property
    def oracle(self) -> bool:
        """Outputs are known only after the work is done."""
        return self.select_by == "norm"

    @property
    def trains(self) -> bool:
        """Its routers."""
        return self.select_by == "router"

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Heads, and what the decision sees."""
        return {} if self.sparsity == 0 else {"heads": OUTPUT if self.select_by == "norm" else INPUT}

    def unsupported(self, view: View) -> str | None:
        """Where attention can't be replaced, or no group is dropped."""
        if self.sparsity == 0:
            return None
        if "attention" in view.limits:
            return f"{self.name} can't run on {view.name}: {view.limits['attention']}"
        if top_k_count(view.n_kv_heads, self.sparsity) == view.n_kv_heads:
            return f"sparsity {self.sparsity:g} drops none of the {view.n_kv_heads} KV groups of {view.name}"
        if self.dense_layers >= view.n_layers:
            return f"all {view.n_layers} blocks of {view.name} are among the {self.dense_layers} that stay dense"
        return None

    def fit_key(self) -> dict[str, object]:
        """What the routers depend on; nothing is learnt without them."""
        key = super().fit_key() | {"select_by": self.select_by}
        names = ("dense_layers", "label_density", "epochs", "seed") if self.select_by == "router" else ()
        return key | {name: getattr(self, name) for name in names}

    def fit(self, view: View, calibration: Calibration) -> State:
        """Routers of the blocks that are not dense, resumable by block.

        weight float32 [blocks, KV heads, d_model] on the attention's normed input, bias [blocks, KV heads], and recall
        [blocks] on held-out tokens.
        """
        if self.select_by != "router":
            return {}
        inputs: list[list[Tensor]] = [[] for _ in view.blocks]
        labels: list[list[Tensor]] = [[] for _ in view.blocks]

        def see(layer: int, x: Tensor) -> None:
            if layer >= self.dense_layers:
                inputs[layer].append(x.flatten(0, 1).clone())

        def mark(layer: int, x: Tensor) -> None:
            if layer >= self.dense_layers:
                energy = group_energy(view, x.flatten(0, 1))
                labels[layer].append(keep_mask(best(energy, 1 - self.label_density), energy))

        calibration.visit({"attn_in": see, "attn_out": mark})
        parts = []
        for layer in track(range(self.dense_layers, view.n_layers), "training routers of heads"):
            x, wanted = torch.cat(inputs[layer]), torch.cat(labels[layer])
            parts.append(calibration.scratch.part(f"{layer:03d}", lambda x=x, y=wanted, i=layer: self._train(x, y, i)))
        return {key: torch.stack([part[key] for part in parts]) for key in parts[0]}

    def _train(self, x: Tensor, labels: Tensor, layer: int) -> State:
        """A linear layer, made of two without anything between them; a channel of ones is its bias."""
        made = train(F.pad(x, (0, 1), value=1.0), labels, labels.shape[1], self.epochs, 0.0, 1000 * self.seed + layer)
        whole = made.up @ made.down
        return {
            "weight": whole[:, :-1].contiguous(), "bias": whole[:, -1].contiguous(), "recall": torch.tensor(made.recall)
        }  # fmt: skip

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """The routers' own weights."""
        if self.sparsity == 0 or self.select_by != "router":
            return {}
        return {"attn": state["weight"].numel() + state["bias"].numel()}

    def attach(self, view: View, state: State) -> AbstractContextManager[None]:
        """Drop heads until the context ends; afterwards the model is bit for bit what it was."""
        if self.sparsity == 0:
            return nullcontext()
        return masked_heads.skipping(view, self.sites["heads"], self._rule(view, state), "mask_output")

    @property
    def own_kernels(self) -> bool:
        """Not by the norm: it is known when all heads are done, and nothing is left to skip."""
        return self.sparsity > 0 and self.select_by != "norm"

    def attach_kernels(self, view: View, state: State) -> AbstractContextManager[kernel_heads.KernelHeads]:
        """Skip entries of the cache, and for a single token rows of q and columns of o too."""
        return kernel_heads.skipping(view, self.sites["heads"], self._rule(view, state), "mask_output")

    def routers(self, view: View, state: State) -> Mapping[int, Router] | None:
        """Those of the blocks that are not dense, in the model's type."""
        if self.sparsity == 0 or self.select_by != "router":
            return None
        top = top_k_count(view.n_kv_heads, self.sparsity)
        weights, biases = (state[key].to(view.device, view.dtype) for key in ("weight", "bias"))
        return {self.dense_layers + i: Router(w, b, top) for i, (w, b) in enumerate(zip(weights, biases, strict=True))}

    def _rule(self, view: View, state: State) -> Decide:
        routers = self.routers(view, state) or {}
        generator = torch.Generator().manual_seed(self.seed)
        tables = [random_table(view.n_kv_heads, generator).to(view.device) for _ in view.blocks]

        def scores(layer: int, x: Tensor, step: Step) -> Tensor:
            if self.select_by == "random":
                return of_position(tables[layer], step)
            if self.select_by == "norm":
                return group_energy(view, x)
            return F.linear(x, routers[layer].weight, routers[layer].bias)

        def decide(layer: int, x: Tensor, step: Step) -> Tensor:
            if layer < self.dense_layers:
                return torch.ones(*x.shape[:2], view.n_heads, dtype=torch.bool, device=x.device)
            score = scores(layer, x, step)
            return keep_mask(best(score, self.sparsity), score).repeat_interleave(view.group_size, -1)

        return decide


def group_energy(view: View, x: Tensor) -> Tensor:
    """Squared L2 norms float32 [..., KV heads] of the groups' part in heads' outputs [..., heads * head_dim]."""
    return head_energy(view, x).unflatten(-1, (view.n_kv_heads, -1)).sum(-1)
