"""Calibration: what a method may learn from. Forward passes over fixed text, with the activations that fits ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from harness.fitting.scratch import Scratch
from harness.model.logits import final_hidden
from harness.model.step import Policy
from harness.model.view import View
from harness.progress import track

# Point -> whose input (or output) is seen.
POINTS = ("residual", "attn_in", "attn_out", "mlp_in", "gate", "mlp_hidden")


class Calibration:
    """Calibration text and the activations of one (patched) model on it.

    batches: int64 token windows [batch, length], no padding. passes: forward passes over the text made so far.
    used: whether anybody has looked at the text since this was last set to False.
    scratch: where a long fit keeps its finished layers.
    bare: whether the caller knows that no method is attached, so that a pass is the dense model's.
    """

    def __init__(self, view: View, batches: Iterable[Tensor], bare: bool = False) -> None:
        self.view, self.bare = view, bare
        self._batches = [batch.to(view.device) for batch in batches]
        self.passes = 0
        self.used = False
        self.scratch = Scratch()
        self._kept: dict[str, list[Tensor]] = {}

    @property
    def batches(self) -> list[Tensor]:
        """The text itself."""
        self.used = True
        return self._batches

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return sum(batch.numel() for batch in self._batches)

    def visit(
        self,
        see: Mapping[str, Callable[[int, Tensor], None]],
        final: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        """One pass over the text; `see[point](layer, x)` gets x [batch, length, n] of every layer and batch.

        Points: residual (input of the block), attn_in, attn_out, mlp_in, mlp_hidden (inputs of the projections) and
        gate (the activated gate). final: gets every batch [batch, length] with the final hidden states of all of its
        places [batch, length, d_model].
        """
        handles = []
        for layer, block in enumerate(self.view.blocks):
            modules = {
                "residual": block.residual,
                "attn_in": block.q,
                "attn_out": block.o,
                "mlp_in": block.up,
                "mlp_hidden": block.down,
            }
            for point, callback in see.items():
                if point == "gate":
                    handles.append(block.act.register_forward_hook(self._output_hook(callback, layer)))
                else:
                    handles.append(modules[point].register_forward_pre_hook(self._input_hook(callback, layer)))
        try:
            with torch.no_grad(), self.view.tracker.tracking(Policy()):
                for batch in track(self.batches, "calibration pass"):
                    self._shape = batch.shape
                    valid = torch.ones_like(batch, dtype=torch.bool)
                    with ExitStack() as stack:
                        states = stack.enter_context(final_hidden(self.view)) if final else []
                        stack.enter_context(self.view.tracker.hint(valid, decode=~valid))
                        self.view.model(batch, use_cache=False, logits_to_keep=0 if final else 1)
                    if final:
                        final(batch, states[0])
        finally:
            for handle in handles:
                handle.remove()
        self.passes += 1

    def activations(self, *points: str) -> dict[str, list[Tensor]]:
        """Point -> for every layer the activations [tokens, n], kept in memory, collected once."""
        self.used = True
        missing = [p for p in points if p not in self._kept]
        if missing:
            found: dict[str, list[list[Tensor]]] = {p: [[] for _ in self.view.blocks] for p in missing}
            self.visit({p: (lambda layer, x, p=p: found[p][layer].append(x.flatten(0, 1).clone())) for p in missing})
            for p in missing:
                self._kept[p] = [torch.cat(parts) for parts in found[p]]
        return {p: self._kept[p] for p in points}

    def forget(self) -> None:
        """Let go of the activations; whoever asks again makes another pass."""
        self._kept.clear()

    def _input_hook(self, callback: Callable[[int, Tensor], None], layer: int):  # noqa: ANN202 (a torch hook)
        def hook(_: nn.Module, args: tuple) -> None:
            callback(layer, args[0].view(*self._shape, args[0].shape[-1]).to(self.view.device))

        return hook

    def _output_hook(self, callback: Callable[[int, Tensor], None], layer: int):  # noqa: ANN202 (a torch hook)
        def hook(_: nn.Module, _args: tuple, out: Tensor) -> None:
            callback(layer, out.view(*self._shape, out.shape[-1]).to(self.view.device))

        return hook
