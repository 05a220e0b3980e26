"""Skip-softmax: attention without the blocks of the cache that weigh next to nothing (BLASST, arXiv 2512.12087)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution import kernel_blocks, masked_blocks
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.quantiles import GRID, Quantiles
from harness.model.sees import INPUT, Sees
from harness.model.step import Step
from harness.model.view import View

PHASES = ("prefill", "decode")
# Of the second half of a calibration window every so many-th token stands for one that is decoded. No divisor of a
# block: those would all be at the same place of their last block.
EVERY = 3


@dataclass(frozen=True)
class SkipSoftmax(Method):
    """Skips a block of V where its largest score lies below the largest so far by more than -ln(lambda) (section 3).

    lambda = scale / context, at most 1, with one scale for prompts and one for decoding, found on calibration text such
    that a share `sparsity` of the blocks is skipped at its length. K is read whole, so of the cache's bytes half as
    many are spared. The largest so far is in the order of the cache; kernels that split the cache keep to it.

    block: entries of the cache that are skipped together. tile: tokens of a prompt that skip a block together, where
    none of them needs it; a token that is decoded decides alone. With grouped queries all heads of a group decide
    together.
    """

    block: int = 64
    tile: int = 64

    name: ClassVar[str] = "skip_softmax"
    paper: ClassVar[str] = "arXiv 2512.12087"
    needs: ClassVar[str] = "calibration"
    fit_fields: ClassVar[tuple[str, ...]] = ("block", "tile")

    def __post_init__(self) -> None:
        for key in ("block", "tile"):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1:
                raise ConfigError(
                    f"method.skip_softmax.{key} must be a whole number of at least 1, not {getattr(self, key)!r}"
                )

    @property
    def sites(self) -> Mapping[str, Sees]:
        """The cache; what is seen are the scores."""
        return {} if self.sparsity == 0 else {"kv": INPUT}

    def unsupported(self, view: View) -> str | None:
        """Where attention can't be replaced."""
        if self.sparsity > 0 and "attention" in view.limits:
            return f"{self.name} can't run on {view.name}: {view.limits['attention']}"
        return None

    def fit(self, view: View, calibration: Calibration) -> State:
        """Quantiles of ln(context) + gap of blocks, float32 [4001] by phase: that of a level is its ln(scale)."""
        seen: dict[str, list[Tensor]] = {phase: [] for phase in PHASES}

        def record(layer: int, gaps: Tensor, step: Step) -> Tensor:
            context = context_of(step)[:, None, :, None]
            tiled = by_tile(gaps, step, self.tile)[:, :, :: self.tile] + context[:, :, :: self.tile]
            length = gaps.shape[2]
            alone = gaps[:, :, length // 2 :: EVERY] + torch.log(
                step.position[:, None, length // 2 :: EVERY, None] + 1.0
            )
            for phase, found in zip(PHASES, (tiled, alone), strict=True):
                seen[phase].append(found[found > -torch.inf].float().cpu())
            return torch.ones_like(gaps, dtype=torch.bool)

        with masked_blocks.skipping(view, self.block, record):
            calibration.visit({})
        return {phase: _grid(torch.cat(found)) for phase, found in seen.items()}

    def attach(self, view: View, state: State) -> AbstractContextManager[None]:
        """Skip blocks until the context ends; afterwards the model is bit for bit what it was."""
        if self.sparsity == 0:
            return nullcontext()
        return masked_blocks.skipping(view, self.block, partial(decide, self._log_scale(state), self.tile))

    @property
    def own_kernels(self) -> bool:
        """For tokens that are decoded."""
        return self.sparsity > 0

    def attach_kernels(self, view: View, state: State) -> AbstractContextManager[kernel_blocks.KernelBlocks]:
        """Skip blocks of V in the decode attention kernel."""
        scales = self._log_scale(state)
        return kernel_blocks.skipping(view, self.block, partial(decide, scales, self.tile), scales["decode"])

    def _log_scale(self, state: State) -> dict[str, float]:
        return {phase: Quantiles.at(state[phase], self.sparsity) for phase in PHASES}


def decide(log_scale: Mapping[str, float], tile: int, layer: int, gaps: Tensor, step: Step) -> Tensor:
    """Blocks to keep, bool, from gaps [batch, KV heads, tokens, blocks] (see `masked_blocks.Decide`)."""
    scale = torch.where(step.decode, log_scale["decode"], log_scale["prefill"])
    limit = (scale - context_of(step)).clamp(max=0).to(gaps.dtype)
    return by_tile(gaps, step, tile) >= limit[:, None, :, None]


def context_of(step: Step) -> Tensor:
    """The logarithm of each token's context [batch, tokens]: the prompt's length, or what a decoded token sees."""
    prompt = step.prompt.sum(1, keepdim=True)
    return torch.log(torch.where(step.decode, step.position + 1, prompt).clamp(min=1).double())


def by_tile(gaps: Tensor, step: Step, tile: int) -> Tensor:
    """Gaps of a prompt's tokens raised to the largest in their tile of it; those of decoded tokens as they are."""
    if not step.has_prompt:
        return gaps
    prompt = step.prompt[:, None, :, None]
    number = (step.position.clamp(min=0) // tile)[:, None, :, None].expand_as(gaps)
    tiles = torch.full_like(gaps, -torch.inf)[:, :, : int(number.max()) + 1]
    tiles = tiles.scatter_reduce(2, number, torch.where(prompt, gaps, -torch.inf), "amax")
    return torch.where(prompt, tiles.gather(2, number), gaps)


def _grid(values: Tensor) -> Tensor:
    """Quantiles of values [n] at even steps of probability."""
    at = torch.linspace(0, len(values) - 1, GRID).long()
    return values.sort().values[at]
