"""R-Sparse: thresholded input channels, and a low-rank product for those that were dropped (arXiv 2504.19449)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.changes import LowRank, changed
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.sees import Sees
from harness.model.selection import PROJECTIONS, Mask, Selection, Thresholds, keep_mask
from harness.model.step import Step
from harness.model.view import View
from harness.progress import track
from methods.norms import column_norms, contribution_quantiles, norm_thresholds
from methods.rotation import replaced_weight
from methods.teal import levels_of
from methods.topk import channels


@dataclass(frozen=True)
class RSparse(Method):
    """Computes W_S x_S + L x_rest: S are the inputs with |x_i| * ||W[:, i]||_2 above a threshold, L is W at low rank.

    That is (W - L) x_S + L x, and so it runs here: the column kernels take W - L, and L x is two small products.

    sparsity: share of the channels that are dropped. remainder: share of each projection's weights that the low-rank
        part reads for every token; the paper writes (1 - s)(1 - a) for it, s being the share saved in all and a the
        channels' part of what is left (its released search came to 0.02 at s = 0.5). 0 leaves a plain threshold.
    dense_prompt: share of each prompt, from its start, that stays dense. The released command leaves it at 0.9 (its
        `prefill_ratio` is 0.1), and tables made with it say so; here it is 0.
    """

    remainder: float = 0.02
    dense_prompt: float = 0.0

    name: ClassVar[str] = "rsparse"
    paper: ClassVar[str] = "arXiv 2504.19449"
    needs: ClassVar[str] = "calibration"
    fit_fields: ClassVar[tuple[str, ...]] = ("remainder",)

    def __post_init__(self) -> None:
        if not 0 <= self.dense_prompt <= 1:
            raise ConfigError(f"method.rsparse.dense_prompt is a share: from 0 to 1, not {self.dense_prompt}")
        if not 0 <= self.remainder <= 2:
            raise ConfigError(f"method.rsparse.remainder must lie between 0 and 2 (full rank), not {self.remainder}")

    @property
    def names_neurons(self) -> bool:
        """It takes their weights apart."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Input channels of all seven projections."""
        return channels(self.sparsity)

    def unsupported(self, view: View) -> str | None:
        """What is left of each matrix must be storable as the model's are."""
        if "weights" in view.limits:
            return f"{self.name} takes a part out of each matrix of {view.name}: {view.limits['weights']}"
        return super().unsupported(view)

    def fit(self, view: View, calibration: Calibration) -> State:
        """By projection P and layers that have it, float32.

        P [layers, grid], quantiles of the scores; P.norm [layers, n], column norms of W.

        P.out [layers, m, r] and P.in [layers, r, n], where there is a remainder: P.out @ P.in is the matrix of rank r
        that is nearest to W (a truncated SVD).
        """
        state = contribution_quantiles(view, calibration)
        norms = column_norms(view)
        for name in track(view.projection_names(), "low-rank parts"):
            layers = [layer for layer in range(view.n_layers) if (name, layer) in norms]
            state[f"{name}.norm"] = torch.stack([norms[name, layer] for layer in layers])
            rank = rank_of(view, name, self.remainder)
            if rank:
                parts = [low_rank(getattr(view.blocks[layer], name).weight, rank) for layer in layers]
                state[f"{name}.out"] = torch.stack([left for left, _ in parts])
                state[f"{name}.in"] = torch.stack([right for _, right in parts])
        return state

    def plan(self, view: View, state: State) -> dict[tuple[str, int], Thresholds]:
        """Thresholds on |x| [channels] by (projection, layer): by the norms of W, which is not there any more."""
        norms = {(p, i): n.to(view.device) for p in view.projection_names() for i, n in enumerate(state[f"{p}.norm"])}
        return norm_thresholds(norms, state, levels_of(view, None, self.sparsity), view.dtype)

    def select(
        self, plan: dict[tuple[str, int], Thresholds], site: str, layer: int, x: Tensor, step: Step
    ) -> dict[str, Selection]:
        """Static thresholds; everything in the part of a prompt that stays dense. x: [batch, tokens, channels]."""
        own: dict[str, Selection] = {p: plan[p, layer] for p in PROJECTIONS[site] if (p, layer) in plan}
        if self.dense_prompt == 0 or not step.has_prompt:
            return own
        first = step.position < self.dense_prompt * step.prompt.sum(-1, keepdim=True)
        dense = (step.prompt & first)[..., None]
        return {p: Mask(keep_mask(selection, x) | dense) for p, selection in own.items()}

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """The low-rank parts."""
        found = {"attn": 0, "mlp": 0}
        for key, value in state.items():
            if key.endswith((".in", ".out")):
                found["attn" if key.partition(".")[0] in ("q", "k", "v", "o") else "mlp"] += value.numel()
        return found

    def rewrite(self, view: View, state: State) -> AbstractContextManager[None]:
        """W - L in the place of W, and L x added."""
        return nullcontext() if self.sparsity == 0 else _split(view, state)


def rank_of(view: View, projection: str, remainder: float) -> int:
    """The rank at which two factors hold a share `remainder` of the projection's weights; at most full rank."""
    module = getattr(view.blocks[0], projection)
    m, n = module.out_features, module.in_features
    return min(round(remainder * m * n / (m + n)), m, n)


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors float32 [m, rank] and [rank, n], on the CPU, of the matrix of that rank nearest to weight [m, n]."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    return (u[:, :rank] * s[:rank]).float().cpu(), v[:rank].float().cpu()


@contextmanager
def _split(view: View, state: State) -> Iterator[None]:
    """Leave W - L in the projections, and add L x to what they give, x being their input before anything is dropped."""
    with ExitStack() as stack:
        for layer, block in enumerate(view.blocks):
            for name, module in block.projections():
                if f"{name}.in" not in state:
                    continue
                left, right = (
                    state[f"{name}.{part}"][layer].to(module.weight.device, view.dtype) for part in ("out", "in")
                )
                wide = torch.promote_types(view.dtype, torch.float32)
                rest = (module.weight.data.to(wide) - left.to(wide) @ right.to(wide)).to(view.dtype)
                stack.enter_context(replaced_weight(module, rest))
                stack.enter_context(changed(module, LowRank(left, right)))
        yield
