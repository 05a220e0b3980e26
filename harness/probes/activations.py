"""What the sparsity probe reads off the model itself: thresholds, magnitudes, zeros known from the gate alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from harness.execution.attach import Fitted, attached
from harness.execution.ledger import PHASES
from harness.fitting.quantiles import Quantiles
from harness.model.sees import GATE
from harness.model.selection import PROJECTIONS, Thresholds
from harness.model.step import Policy, Step
from harness.model.view import View

Row = dict[str, Any]
# Shares of the entries that lie below; as fine as a histogram needs, and finer where the tail is.
LEVELS = (0.001, 0.01, 0.02, *(round(0.05 * i, 2) for i in range(1, 20)), 0.98, 0.99, 0.999)
LAYERS = 4  # whose magnitudes are kept: the first, the last, and two in between
FROM_GATE = "known from the gate alone: rows of up and columns of down can be skipped"
FROM_PRODUCT = "zeros of the product: columns of down can be skipped"


class Watch:
    """Counts, over the passes inside `watching`, zeros of the activated gate and magnitudes of the MLP's inputs.

    gate: float64 [layers, 2, 2]: (zeros, entries) by phase. magnitudes: site -> |x| of `LAYERS` layers.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.gate = torch.zeros(view.n_layers, 2, 2, dtype=torch.float64)
        self.layers = sorted({round(i * (view.n_layers - 1) / (LAYERS - 1)) for i in range(LAYERS)})
        self.magnitudes = {site: Quantiles(len(self.layers)) for site in ("mlp_in", "mlp_hidden")}
        self.tokens = 0

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Watch every forward pass inside. Enter after methods are attached: a swapped activation is another module."""
        handles = []
        for layer, block in enumerate(self.view.blocks):
            if block.gate is not None:
                handles.append(block.act.register_forward_hook(lambda _m, _a, out, i=layer: self._count(i, out)))
        for place, layer in enumerate(self.layers):
            block = self.view.blocks[layer]
            for site, module in (("mlp_in", block.up), ("mlp_hidden", block.down)):
                handles.append(
                    module.register_forward_pre_hook(lambda _m, args, s=site, i=place: self._see(s, i, args[0]))
                )
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, layer: int, x: Tensor) -> None:
        step = self.view.tracker.step
        assert step is not None
        zeros = (x == 0).sum(-1).view(step.valid.shape)
        for phase, tokens in enumerate((step.prompt, step.valid & step.decode)):
            self.gate[layer, phase] += torch.stack([zeros[tokens].sum(), tokens.sum() * x.shape[-1]]).double().cpu()

    def _see(self, site: str, place: int, x: Tensor) -> None:
        step = self.view.tracker.step
        assert step is not None
        kept = x.view(*step.valid.shape, -1)[step.valid]
        self.magnitudes[site].see(place, kept)
        if site == "mlp_in" and place == 0:
            self.tokens += len(kept)

    def rows(self) -> Iterator[Row]:
        """`zeros` at `gate`, by layer and in all, and quantiles of |x| (`magnitude_q<level>`) of a few layers."""
        if self.gate.any():
            for layer, counts in [*enumerate(self.gate), (None, self.gate.sum(0))]:
                parts = [*zip(PHASES, counts, strict=True), ("all", counts.sum(0))]
                for phase, (zeros, entries) in parts:
                    if entries > 0:
                        n = int(entries / self.view.d_ff / (self.view.n_layers if layer is None else 1))
                        facts = {"metric": "zeros", "value": (zeros / entries).item(), "n": n, "unit": "share"}
                        yield {"site": "gate", "layer": layer, "step_phase": phase, "message": FROM_GATE} | facts
        for site, quantiles in self.magnitudes.items():
            for layer, grid in zip(self.layers, quantiles.grid(), strict=True):
                for level in LEVELS:
                    facts = {"metric": f"magnitude_q{level:g}", "value": Quantiles.at(grid, level), "n": self.tokens}
                    yield {"site": site, "layer": layer, "step_phase": "all", "unit": "activation"} | facts


def thresholds(view: View, methods: Fitted, policy: Policy) -> Iterator[Row]:
    """A row `threshold` for every layer and projection (or `neurons`, for a threshold on the gate) that has one.

    A threshold for each channel is told by its median. A method is asked while those outside it are attached. Methods
    that fix their thresholds by the prompt, and swapped activations (they drop exact zeros), have none to tell.
    """
    for place, (method, state) in enumerate(methods):
        sites = [site for site, sees in method.sites.items() if site in PROJECTIONS or sees == GATE]
        if method.swap or not sites:
            continue
        with attached(view, methods[:place], policy), method.rewrite(view, state):
            plan = method.plan(view, state)
            for site in sites:
                for layer in range(view.n_layers):
                    own = dict(view.blocks[layer].projections())
                    names = [p for p in PROJECTIONS.get(site, ()) if p in own]
                    width = view.channels(names[0]) if names else view.d_ff
                    x = torch.zeros(1, 1, width, dtype=view.dtype, device=view.device)
                    chosen = method.select(plan, site, layer, x, _one_token(view.device))
                    one_each = chosen if isinstance(chosen, Mapping) else dict.fromkeys(names or [site], chosen)
                    for name, selection in one_each.items():
                        if isinstance(selection, Thresholds) and (name in names or not names):
                            yield _threshold(selection.t, name, layer)


def _threshold(t: float | Tensor, name: str, layer: int) -> Row:
    several = isinstance(t, Tensor) and t.numel() > 1
    row = {"metric": "threshold", "value": float(torch.as_tensor(t).float().median()), "unit": "activation"}
    row |= {"site": name, "layer": layer, "step_phase": "all", "n": t.numel() if isinstance(t, Tensor) else 1}
    return row | ({"message": "median of a threshold a channel"} if several else {})


def _one_token(device: torch.device) -> Step:
    yes = torch.ones(1, 1, dtype=torch.bool, device=device)
    return Step(valid=yes, decode=yes, position=yes.long(), sparse=None, past=1, input_ids=None)
