"""The ledger: achieved sparsity, counted. Every share is kept as a numerator and a denominator, by valid token.

Counting looks at the tensors that reach the projections after every method has had its say, so a method that only
pretends to be sparse is counted as dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harness.families import View
from harness.selection import PROJECTIONS

PHASES = ("prefill", "decode")
ATTENTION = ("q", "k", "v", "o")
SITE_OF = {projection: site for site, projections in PROJECTIONS.items() for projection in projections}


@dataclass(eq=False)
class Ledger:
    """Counts of one attached stretch of forward passes.

    sites: sites that the attached methods declare. Channels at other sites count as touched.
    Totals are float64 [2] (prefill, decode): `kept` and `total` by (layer, site | "zeros"), in channels, neurons or
    heads; `touched` by (layer, projection), in weights; `tokens` [2].
    """

    view: View
    sites: frozenset[str]
    kept: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    total: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    touched: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    _rows: dict[tuple[str, int], tuple[Tensor, bool]] = field(default_factory=dict)
    _columns: dict[str, Tensor | float] = field(default_factory=dict)
    _share: tuple[Tensor, Tensor] | None = None
    _weights: tuple[object, Tensor] | None = None

    def rows(
        self, site: str, layer: int, keep: Tensor, dense_gate: bool = False, kv_keep: Tensor | None = None
    ) -> None:
        """Note which neurons or heads a method kept. keep: bool [batch, tokens, n].

        dense_gate: the decision needed every gate row. kv_keep: bool [batch, tokens, KV heads] where K and V of
        dropped heads are not made (None: they all are).
        """
        n = keep.shape[-1]
        count = torch.count_nonzero(keep, dim=-1).flatten()
        before = self._rows.get((site, layer))
        share = count / n
        self._rows[site, layer] = (share if before is None else share * before[0], dense_gate)
        if kv_keep is not None:
            self._rows["kv", layer] = (torch.count_nonzero(kv_keep, dim=-1).flatten() / kv_keep.shape[-1], False)
        self._add(layer, site, count, n)

    @contextmanager
    def counting(self) -> Iterator[Ledger]:
        """Count every forward pass inside. Enter after the methods are attached: hooks run in order."""
        handles = []
        for layer, block in enumerate(self.view.blocks):
            for name, module in block.projections():
                handles.append(module.register_forward_pre_hook(self._hook(layer, name)))
        before, self.view.ledger = self.view.ledger, self
        try:
            yield self
        finally:
            self.view.ledger = before
            for handle in handles:
                handle.remove()
            self._rows.clear()
            self._columns.clear()
            self._share = self._weights = None

    def _hook(self, layer: int, projection: str):  # noqa: ANN202 (a torch hook)
        site = SITE_OF[projection]
        last = layer == self.view.n_layers - 1 and projection == "down"

        def hook(_: nn.Module, args: tuple) -> None:
            x = args[0]
            columns: Tensor | float = 1.0
            if site in self.sites or projection == "down":
                nonzero = self._nonzero(x)
                if projection == "down":
                    self._add(layer, "zeros", nonzero, x.shape[-1])
                if site in self.sites:
                    columns = nonzero / x.shape[-1]
                    self._add(layer, site, nonzero, x.shape[-1])
            self._columns[projection] = columns
            if projection in ("o", "down"):  # by now all of the sublayer is decided, oracles included
                for name, share in self._columns.items():
                    size = float(self.view.weights(name))
                    self._accumulate((layer, name), self._row_share(name, layer) * share, size)
                self._columns.clear()
            if last:
                tokens = self._phase_weights().sum(1)
                self.tokens = tokens if self.tokens is None else self.tokens + tokens
                self._rows.clear()

        return hook

    def _row_share(self, projection: str, layer: int) -> Tensor | float:
        """Share of the projection's rows (columns, for o and down) that the kept neurons or heads need."""
        if projection in ("gate", "up", "down"):
            share, dense_gate = self._rows.get(("neurons", layer), (1.0, False))
            skipped = projection == "down" and "mlp_hidden" in self.sites  # then the columns are counted themselves
            return 1.0 if skipped or (dense_gate and projection == "gate" and self.view.gated) else share
        if projection in ("k", "v"):
            return self._rows.get(("kv", layer), (1.0, False))[0]
        if projection == "o" and "attn_out" in self.sites:
            return 1.0
        return self._rows.get(("heads", layer), (1.0, False))[0]

    def _nonzero(self, x: Tensor) -> Tensor:
        if self._share is None or self._share[0] is not x:
            self._share = (x, torch.count_nonzero(x, dim=-1).flatten())
        return self._share[1]

    def _phase_weights(self) -> Tensor:
        """float64 [2, batch * tokens]: 1 where a token is valid and in that phase."""
        step = self.view.tracker.step
        assert step is not None
        if self._weights is None or self._weights[0] is not step:
            prompt, decode = step.prompt.flatten(), (step.valid & step.decode).flatten()
            self._weights = (step, torch.stack([prompt, decode]).double())
        return self._weights[1]

    def _add(self, layer: int, site: str, count: Tensor, n: int) -> None:
        weights = self._phase_weights()
        self._sum(self.kept, (layer, site), weights @ count.double())
        self._sum(self.total, (layer, site), weights.sum(1) * n)

    def _accumulate(self, key: tuple[int, str], share: Tensor | float, size: float) -> None:
        weights = self._phase_weights()
        counted = weights.sum(1) * share if isinstance(share, float) else weights @ share.double()
        self._sum(self.touched, key, counted * size)

    @staticmethod
    def _sum(into: dict, key: tuple, value: Tensor) -> None:
        into[key] = into[key] + value if key in into else value

    # --- reading it

    def skipped_weights(self, projections: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """(skipped, total) weights over all layers, float64 [2] by phase, each token counted apart."""
        assert self.tokens is not None
        names = [p for p in self.view.projection_names() if p in projections]
        total = self.tokens * float(sum(self.view.weights(p) for p in names) * self.view.n_layers)
        touched = sum((v for (_, p), v in self.touched.items() if p in names), torch.zeros_like(total))
        return total - touched, total
