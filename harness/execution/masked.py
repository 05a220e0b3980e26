"""Masked execution: the definition. Hooks that zero what a method drops, inside the Hugging Face module itself.

A dense matmul on zeroed inputs equals a matmul that skips those inputs, so quality is measured here at any batch. The
kernel execution of the same selections lives in harness/execution/kernel.py. Of a model whose blocks lie on several
devices a decision is made where the first one lies, with all that it is made from, and what it comes to is brought to
the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.model.sees import GATE, OUTPUT, PROMPT, Sees
from harness.model.selection import PROJECTIONS, Selection, SiteSelection, apply, keep_mask, placed
from harness.model.step import Step
from harness.model.view import View

# (site, layer, what is seen there [batch, tokens, channels], step) -> what is kept.
Decide = Callable[[str, int, Tensor, Step], SiteSelection]


class Decided(NamedTuple):
    """What was decided in a layer for the tensor x, and x with it applied, by the id of each selection."""

    layer: int
    x: Tensor
    selection: SiteSelection
    applied: dict[int, Tensor]


class Installation:
    """The hooks of one attached method: the sites that it touches, what is seen there, and how it decides."""

    def __init__(self, view: View, sites: Mapping[str, Sees], decide: Decide) -> None:
        self.view, self.sites, self.decide = view, sites, decide
        self.handles: list[Any] = []
        # By site. Holding x keeps its identity valid: q, k and v (gate and up) read the same tensor, and one decision
        # serves them. Only the layer under way is held: of all layers it would be ten gigabytes on 128 short texts.
        self.decided: dict[str, Decided] = {}
        self.kept: dict[tuple[str, int], Tensor] = {}  # bool keep masks of neurons and heads, until they are used
        self.residual: dict[int, Tensor] = {}  # by layer, as far back as a decision may look
        self.lookback = 0  # layers

    def install(self) -> None:
        """Register the hooks of every declared site."""
        for site, sees in self.sites.items():
            for layer in range(self.view.n_layers):
                if site in PROJECTIONS:
                    self._install_channels(site, layer)
                elif site == "neurons":
                    self._install_neurons(layer, sees)
                elif site == "heads":
                    self._install_heads(layer, sees)
                else:
                    raise ValueError(f"unknown site {site!r}")
        back = [sees.blocks_back for sees in self.sites.values() if sees.point == "residual"]
        self.lookback = max(back, default=0)
        if back:
            for layer, block in enumerate(self.view.blocks):
                self._before(block.residual, self._keep_residual(layer))

    def remove(self) -> None:
        """Remove every hook; nothing of the method stays."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.decided.clear()
        self.kept.clear()
        self.residual.clear()

    # --- registration

    def _before(self, module: nn.Module, rewrite: Callable[[Tensor], Tensor | None]) -> None:
        def hook(_: nn.Module, args: tuple) -> tuple | None:
            x = rewrite(args[0])
            return None if x is None else (x, *args[1:])

        self.handles.append(module.register_forward_pre_hook(hook))

    def _after(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        self.handles.append(module.register_forward_hook(lambda _m, _args, out: see(out)))

    def _install_channels(self, site: str, layer: int) -> None:
        block = self.view.blocks[layer]
        for projection in PROJECTIONS[site]:
            module = getattr(block, projection)
            if module is not None:
                self._before(module, lambda x, p=projection: self._channels(site, layer, p, x))

    def _install_neurons(self, layer: int, sees: Sees) -> None:
        block = self.view.blocks[layer]
        first = block.gate if block.gate is not None else block.up
        if sees == GATE:
            self._after(block.act, lambda x: self._decide_rows("neurons", layer, x))
        elif sees == PROMPT:
            self._before(first, lambda x: None if self.step.has_prompt else self._decide_rows("neurons", layer, x))
        elif sees != OUTPUT:
            self._before(first, lambda x: self._decide_rows("neurons", layer, self._seen(sees, layer, x)))

        def drop(x: Tensor) -> Tensor | None:
            if sees == OUTPUT or (sees == PROMPT and self.step.has_prompt):
                self._decide_rows("neurons", layer, x)
            return self._drop_rows("neurons", layer, x, 1)

        self._before(block.down, drop)

    def _install_heads(self, layer: int, sees: Sees) -> None:
        block = self.view.blocks[layer]
        if sees != OUTPUT:
            # Families compute q, k and v in different orders: whichever comes first decides.
            for module in (block.q, block.k, block.v):
                if module is not None:
                    self._before(module, lambda x: self._decide_once("heads", layer, x, sees))

        def drop(x: Tensor) -> Tensor | None:
            if sees == OUTPUT:
                self._decide_rows("heads", layer, x)
            return self._drop_rows("heads", layer, x, self.view.head_dim)

        self._before(block.o, drop)

    # --- what happens in a forward pass

    @property
    def step(self) -> Step:
        """The forward pass that is under way."""
        step = self.view.tracker.step
        assert step is not None, "a method is attached outside of a tracked forward pass"
        return step

    def _shaped(self, x: Tensor) -> Tensor:
        """x as [batch, tokens, n] (OPT's MLP flattens the first two)."""
        return x if x.dim() == 3 else x.view(*self.step.valid.shape, x.shape[-1])

    def _keep_residual(self, layer: int) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            self.residual[layer] = x
            self.residual.pop(layer - self.lookback - 1, None)

        return keep

    def _seen(self, sees: Sees, layer: int, x: Tensor) -> Tensor:
        return self.residual[max(0, layer - sees.blocks_back)] if sees.point == "residual" else x

    def _holds(self, site: str, layer: int, x: Tensor) -> bool:
        held = self.decided.get(site)
        return held is not None and held.layer == layer and held.x is x

    def _decision(self, site: str, layer: int, x: Tensor) -> Decided:
        if not self._holds(site, layer, x):
            selection = self.decide(site, layer, self._shaped(x).to(self.view.device), self.step)
            if self.view.spread:
                selection = placed(selection, x.device)
            self.decided[site] = Decided(layer, x, selection, {})
        return self.decided[site]

    def _channels(self, site: str, layer: int, projection: str, x: Tensor) -> Tensor | None:
        decided = self._decision(site, layer, x)
        own, applied = own_selection(decided.selection, projection), decided.applied
        if own is None:
            return None
        if id(own) not in applied:
            sparse = self.step.sparse
            sparse = None if sparse is None else sparse.to(x.device)
            applied[id(own)] = apply(own, self._shaped(x), sparse).view(x.shape)
        return applied[id(own)]

    def _decide_once(self, site: str, layer: int, x: Tensor, sees: Sees) -> None:
        if not self._holds(site, layer, x):
            self.decided[site] = Decided(layer, x, None, {})
            self._decide_rows(site, layer, self._seen(sees, layer, x))

    def _decide_rows(self, site: str, layer: int, x: Tensor) -> None:
        x = self._shaped(x).to(self.view.device)
        selection = self.decide(site, layer, x, self.step)
        self.kept.pop((site, layer), None)
        if selection is None:
            return
        assert isinstance(selection, Selection)
        keep = keep_mask(selection, x)
        if self.step.sparse is not None:
            keep = keep | ~self.step.sparse[..., None]
        self.kept[site, layer] = keep

    def _drop_rows(self, site: str, layer: int, x: Tensor, width: int) -> Tensor | None:
        # A decision from the prompt serves every step after it, any other one this pass only.
        fixed = self.sites[site] == PROMPT
        keep = self.kept.get((site, layer)) if fixed else self.kept.pop((site, layer), None)
        if keep is None:
            return None
        shaped = self._shaped(x)
        keep = keep.expand(*shaped.shape[:2], keep.shape[-1])
        if self.view.ledger is not None:
            self.view.ledger.rows(site, layer, keep, dense_gate=self.sites[site] == GATE)
        keep = keep.to(x.device)
        wide = keep if width == 1 else keep.repeat_interleave(width, dim=-1)
        return torch.where(wide, shaped, 0).view(x.shape)


def own_selection(selection: SiteSelection, projection: str) -> Selection | None:
    """The projection's part of what was decided at its site."""
    return selection if selection is None or isinstance(selection, Selection) else selection.get(projection)


@contextmanager
def install(view: View, sites: Mapping[str, Sees], decide: Decide) -> Iterator[Installation]:
    """Apply what `decide` selects by masking until the context ends, even by an exception."""
    installation = Installation(view, sites, decide)
    try:
        installation.install()
        yield installation
    finally:
        installation.remove()
