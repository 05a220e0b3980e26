"""LTE: learnt sigmoid routers over experts of neurons (Learn-To-be-Efficient, arXiv 2402.06126). Inference side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.sees import INPUT, Sees
from harness.model.selection import Mask
from harness.model.step import Step
from harness.model.view import View
from harness.results.identity import content_key
from harness.training.checkpoints import Checkpoint, read_checkpoint

CUT = 0.5  # an expert is kept where its score exceeds this (section 4.3)


@dataclass(frozen=True)
class Lte(Method):
    """Keeps, for each token, the experts whose router score sigmoid(w . x) exceeds one half: as many as it takes.

    How sparse it is was settled in training (by the weight of the efficiency loss), so `sparsity` only says on or off:
    0 is dense, anything else is what the routers give, and the achieved sparsity is what counts.

    checkpoint: name or folder of a checkpoint that `python train.py train=lte` has made. It holds `router`
        [layers, experts, d_model], `expert_of` [layers, neurons], and the weights that were trained with them: run it
        on that student (model.adapter, of the same name), not on its base.
    """

    checkpoint: str | None = None

    name: ClassVar[str] = "lte"
    paper: ClassVar[str] = "arXiv 2402.06126"
    needs: ClassVar[str] = "training"
    fit_fields: ClassVar[tuple[str, ...]] = ("checkpoint",)

    def __post_init__(self) -> None:
        if self.checkpoint is None:
            raise ConfigError(
                "method=lte needs trained routers: make them with `python train.py train=lte` and name the folder "
                "that it writes in method.lte.checkpoint"
            )

    @property
    def has_level(self) -> bool:
        """Training settled how sparse it is."""
        return False

    @property
    def trained_tokens(self) -> int:
        """What the checkpoint's record says."""
        return int(self._read().record.get("run", {}).get("tokens", 0))

    @property
    def names_neurons(self) -> bool:
        """Routers were trained for them."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons, decided from the MLP's input."""
        return {} if self.sparsity == 0 else {"neurons": INPUT}

    def unsupported(self, view: View) -> str | None:
        """Routers of another model choose at random."""
        record = self._read().record
        if view.fingerprint != content_key({"base": record.get("base"), "adapter": record["sha256"]}):
            return f"the routers of {self.checkpoint} were trained for another model than {view.name}"
        return super().unsupported(view)

    def _read(self) -> Checkpoint:
        checkpoint = read_checkpoint(str(self.checkpoint))
        if "router" not in checkpoint.tensors or "expert_of" not in checkpoint.tensors:
            raise ConfigError(f"checkpoint {self.checkpoint} holds no routers: it was not trained with train=lte")
        return checkpoint

    def fit(self, view: View, calibration: Calibration) -> State:
        """The checkpoint's router float32 [layers, experts, d_model] and expert_of int64 [layers, neurons]."""
        tensors = self._read().tensors
        return {name: tensors[name] for name in ("router", "expert_of")}

    def plan(self, view: View, state: State) -> list[tuple[Tensor, Tensor]]:
        """(router in the model's dtype, expert of each neuron) of every layer."""
        pairs = zip(state["router"], state["expert_of"], strict=True)
        return [(router.to(view.device, view.dtype), expert_of.to(view.device)) for router, expert_of in pairs]

    def score(self, plan: list[tuple[Tensor, Tensor]], site: str, layer: int, x: Tensor, step: Step) -> Tensor:
        """The router's score of each neuron's expert, [batch, tokens, neurons]. x: the MLP's input."""
        router, expert_of = plan[layer]
        return torch.sigmoid(F.linear(x, router).float())[..., expert_of]

    def select(self, plan: list[tuple[Tensor, Tensor]], site: str, layer: int, x: Tensor, step: Step) -> Mask:
        """The neurons of the experts above one half. x: [batch, tokens, d_model]."""
        return Mask(self.score(plan, site, layer, x, step) > CUT)

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """The routers' own weights."""
        return {"mlp": state["router"].numel() if self.sites else 0}
