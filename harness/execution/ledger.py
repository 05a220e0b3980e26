"""The ledger: achieved sparsity, counted. Every share is kept as a numerator and a denominator, by valid token.

Counting looks at the tensors that reach the projections after every method has had its say, so a method that only
pretends to be sparse is counted as dense. Of neurons and heads that are skipped as a whole masked execution
tells it, and what several methods drop at one site is dropped once. Padding is no token, nor is what a batch feeds to a
sequence that has ended.

Reads of the KV cache are counted beside the weights: a token reads K and V of every entry that it sees (within a
layer's sliding window) in every KV group that a kept query head belongs to, or what the attention says that it read.
Unlike weights these grow with the context and are not shared by the sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from harness.model.families import attention
from harness.model.selection import PROJECTIONS
from harness.model.view import View

PHASES = ("prefill", "decode")
ATTENTION = ("q", "k", "v", "o")
SITE_OF = {projection: site for site, projections in PROJECTIONS.items() for projection in projections}


Note = tuple[str, int, str, int]  # kept or touched, layer, site or projection, n of its share


@dataclass(frozen=True, eq=False)
class Share:
    """A share of something for each token: count / n. count: int64 [batch * tokens], or None where it is all of it."""

    count: Tensor | None = None
    n: int = 1

    def times(self, other: Share) -> Share:
        """Both at once."""
        if self.count is None or other.count is None:
            return other if self.count is None else self
        return Share(self.count * other.count, self.n * other.n)


WHOLE = Share()


@dataclass(eq=False)
class Ledger:
    """Counts of one attached stretch of forward passes.

    sites: sites that the attached methods declare. Channels at other sites count as touched.
    Totals are float64 [2] (prefill, decode): `kept` and `total` by (layer, site | "zeros"), in channels, neurons or
    heads; `touched` by (layer, projection), in weights, and `scales`, of weights that have them; `kv_read` and
    `kv_seen` by layer, in bytes; `tokens` [2]. A pass counts when it is over: what a pass notes is weighted by valid
    token in one product, since small operations by the hundred would cost more than the model's.
    """

    view: View
    sites: frozenset[str]
    tokens: Tensor | None = None
    paused: bool = False  # passes are not counted
    wasted: int = 0  # decode tokens that were counted and thrown away: what they touched is charged to the others
    _noted: list[tuple[Note, Tensor | None]] = field(default_factory=list)  # of this pass: what, and its count
    # By what a pass noted: numerators float64 [counted, 2] and tokens [2] of all passes that noted the same.
    _sums: dict[tuple[tuple[Note, ...], tuple[Note, ...]], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _step: object = None  # the pass that was noted last
    _keep: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # masks of the sublayer under way
    _dense_gate: bool = False  # whether a decision in it needed every gate row
    _columns: dict[str, Share] = field(default_factory=dict)
    _groups: dict[str, Share] = field(default_factory=dict)  # of inputs that share a scale, where weights have them
    _attended: Tensor | None = None  # what the attention under way says that it reads of the cache
    _entries: dict[int | None, Tensor] = field(default_factory=dict)  # of this pass, what tokens see by window
    _seen: tuple[Tensor, Tensor] | None = None

    def rows(
        self, site: str, layer: int, keep: Tensor, dense_gate: bool = False, kv_keep: Tensor | None = None
    ) -> None:
        """Note which neurons or heads a method kept. keep: bool [batch, tokens, n].

        Of nested methods each notes its own: kept is what all of them keep. dense_gate: the decision needed every gate
        row. kv_keep: bool [batch, tokens, KV heads] where K and V of dropped heads are not made (None: they all are).
        """
        if self.paused:
            return
        self._starts_pass()
        self._dense_gate |= dense_gate
        for name, mask in ((site, keep), ("kv", kv_keep)):
            if mask is not None:
                mask = mask.to(self.view.device)
                before = self._keep.get((name, layer))
                self._keep[name, layer] = mask if before is None else mask & before

    def attended(self, vectors: Tensor) -> None:
        """Note what the attention under way reads: K and V vectors, int64 [batch, tokens, KV heads].

        For an attention that does not read both of every entry that a token sees. A group without a kept head reads
        nothing all the same.
        """
        if self.paused:
            return
        self._starts_pass()
        self._attended = vectors if self._attended is None else torch.minimum(self._attended, vectors)

    def waste(self, tokens: int) -> None:
        """So many of the decode tokens that were counted are no part of any answer."""
        self.wasted += tokens

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
            self._forget()

    def _hook(self, layer: int, projection: str):  # noqa: ANN202 (a torch hook)
        site = SITE_OF[projection]
        last = layer == self.view.n_layers - 1 and projection == "down"

        def hook(_: nn.Module, args: tuple) -> None:
            if self.paused:
                return
            self._starts_pass()
            x = args[0]
            columns = groups = WHOLE
            if site in self.sites or projection == "down":
                nonzero = Share(self._nonzero(x), x.shape[-1])
                if projection == "down":
                    self._note("kept", layer, "zeros", nonzero)
                if site in self.sites:
                    columns = nonzero
                    self._note("kept", layer, site, nonzero)
                    if self.view.stored is not None:
                        groups = self._grouped((x != 0).to(self.view.device))
            self._columns[projection], self._groups[projection] = columns, groups
            if projection == "o":
                self._cache(layer)
            if projection in ("o", "down"):  # by now all of the sublayer is decided, oracles included
                self._sublayer(layer)
            if last:
                self._count()

        return hook

    def _sublayer(self, layer: int) -> None:
        """Note what the sublayer's decisions come to: neurons or heads kept, weights touched."""
        rows = {name: _share(keep) for (name, _), keep in self._keep.items()}
        for name, kept in rows.items():
            if name != "kv":
                self._note("kept", layer, name, kept)
        for name, columns in self._columns.items():
            self._note("touched", layer, name, self._row_share(name, rows).times(columns))
        if self.view.stored is not None:
            inputs = {
                name: self._grouped(keep, self._width(name)) for (name, _), keep in self._keep.items() if name != "kv"
            }
            for name, groups in self._groups.items():
                share = self._row_share(name, inputs if name in ("o", "down") else rows)
                self._note("scales", layer, name, share.times(groups))
        self._forget_sublayer()

    def _width(self, site: str) -> int:
        """Input channels of o (of down) that a head (a neuron) feeds."""
        return self.view.head_dim if site == "heads" else 1

    def _grouped(self, keep: Tensor, width: int = 1) -> Share:
        """Share of the groups of inputs that have a scale of which anything is kept; bool [..., n], `width` a place."""
        assert self.view.stored is not None
        wide = keep if width == 1 else keep.repeat_interleave(width, dim=-1)
        return _share(wide.unflatten(-1, (-1, self.view.stored.group)).any(-1))

    def _cache(self, layer: int) -> None:
        """Note what the attention's tokens read of the cache and what they see, in K and V vectors of single groups."""
        view, window = self.view, attention.window(self.view.blocks[layer].attn)
        if window not in self._entries:
            assert view.tracker.step is not None
            seen = (view.tracker.step.position + 1).clamp(min=0, max=window)
            self._entries[window] = 2 * seen
        both, keep = self._entries[window], self._keep.get(("heads", layer))
        seen = read = (both * view.n_kv_heads).flatten()
        if keep is not None or self._attended is not None:
            groups = both[..., None].expand(-1, -1, view.n_kv_heads) if self._attended is None else self._attended
            if keep is not None:  # on the layer's own device, where a model is spread
                groups = groups * keep.unflatten(-1, (view.n_kv_heads, -1)).any(-1).to(groups.device)
            read = groups.sum(-1).flatten().to(view.device)
        self._note("kv_read", layer, "kv", Share(read))
        self._note("kv_seen", layer, "kv", Share(seen))

    def _row_share(self, projection: str, rows: dict[str, Share]) -> Share:
        """Share of the projection's rows (columns, for o and down) that the kept neurons or heads need."""
        if projection in ("gate", "up", "down"):
            skipped = projection == "down" and "mlp_hidden" in self.sites  # then the columns are counted themselves
            dense = self._dense_gate and projection == "gate" and self.view.gated
            return WHOLE if skipped or dense else rows.get("neurons", WHOLE)
        if projection in ("k", "v"):
            return rows.get("kv", WHOLE)
        if projection == "o" and "attn_out" in self.sites:
            return WHOLE
        return rows.get("heads", WHOLE)

    def _nonzero(self, x: Tensor) -> Tensor:
        if self._seen is None or self._seen[0] is not x:
            self._seen = (x, count_nonzero(x).flatten().to(self.view.device))
        return self._seen[1]

    def _starts_pass(self) -> None:
        """Where this is another pass than the one before: what an unfinished one has noted does not count."""
        step = self.view.tracker.step
        if self._step is not step:
            self._forget()
            self._step = step

    def _note(self, what: str, layer: int, where: str, share: Share) -> None:
        self._noted.append(((what, layer, where, share.n), share.count))

    def _count(self) -> None:
        """The pass is over: add what it noted, each token weighted by whether it is valid, and in which phase."""
        step = self.view.tracker.step
        assert step is not None
        weights = torch.stack([step.prompt.flatten(), (step.valid & step.decode).flatten()]).double()
        tokens = weights.sum(1)
        counted = tuple(note for note, count in self._noted if count is not None)
        whole = tuple(note for note, count in self._noted if count is None)
        counts = [count for _, count in self._noted if count is not None]
        sums = torch.stack(counts).double() @ weights.T if counts else weights.new_zeros(0, 2)
        before = self._sums.get((counted, whole))
        self._sums[counted, whole] = (sums, tokens) if before is None else (sums + before[0], tokens + before[1])
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        self._forget()

    def _forget(self) -> None:
        self._noted.clear()
        self._entries.clear()
        self._forget_sublayer()
        self._seen = self._step = None

    def _forget_sublayer(self) -> None:
        self._keep.clear()
        self._columns.clear()
        self._groups.clear()
        self._dense_gate, self._attended = False, None

    # --- reading it

    def _read(
        self, what: str, scale: Callable[[int, str, int], float], of_tokens: bool
    ) -> dict[tuple[int, str], Tensor]:
        totals: dict[tuple[int, str], Tensor] = {}
        for (counted, whole), (sums, tokens) in self._sums.items():
            for note, value in [*zip(counted, sums, strict=True), *((note, tokens) for note in whole)]:
                kind, layer, where, n = note
                if kind == what:
                    part = (tokens if of_tokens else value) * scale(layer, where, n)
                    totals[layer, where] = totals[layer, where] + part if (layer, where) in totals else part
        return totals

    @property
    def kept(self) -> dict[tuple[int, str], Tensor]:
        """Channels, neurons or heads that were kept, by (layer, site | "zeros")."""
        return self._read("kept", lambda *_: 1.0, of_tokens=False)

    @property
    def total(self) -> dict[tuple[int, str], Tensor]:
        """What `kept` is a part of."""
        return self._read("kept", lambda _layer, _where, n: n, of_tokens=True)

    @property
    def touched(self) -> dict[tuple[int, str], Tensor]:
        """Weights that were touched, by (layer, projection)."""
        return self._read("touched", lambda layer, name, n: self.view.weights(name, layer) / n, of_tokens=False)

    @property
    def scales(self) -> dict[tuple[int, str], Tensor]:
        """Scales that were touched, by (layer, projection); none where weights have none."""
        if self.view.stored is None:
            return {}
        weights, group = self.view.weights, self.view.stored.group
        return self._read("scales", lambda layer, name, n: weights(name, layer) / group / n, of_tokens=False)

    @property
    def kv_read(self) -> dict[int, Tensor]:
        """Bytes of the KV cache that were read, by layer, each token counted apart, in the model's dtype."""
        return self._cache_bytes("kv_read")

    @property
    def kv_seen(self) -> dict[int, Tensor]:
        """What `kv_read` is of dense attention."""
        return self._cache_bytes("kv_seen")

    def _cache_bytes(self, what: str) -> dict[int, Tensor]:
        width = self.view.head_dim * self.view.dtype.itemsize
        return {layer: v for (layer, _), v in self._read(what, lambda *_: float(width), of_tokens=False).items()}

    def skipped_weights(self, projections: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """(skipped, total) weights over all layers, float64 [2] by phase, each token counted apart.

        All projections together are the whole block: what it reads beside them is then part of the total.
        """
        return self._and_beside(projections, self._skipped(projections, self.touched, 1), 1)

    def skipped_bytes(self, projections: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """As `skipped_weights`, in the bytes that codes and scales are stored in. Of a view with a stored format."""
        stored = self.view.stored
        assert stored is not None
        weights = self._skipped(projections, self.touched, 1)
        scales = self._skipped(projections, self.scales, stored.group)
        skipped, total = (
            weight * stored.bytes(1, 0) + scale * stored.bytes(0, 1)
            for weight, scale in zip(weights, scales, strict=True)
        )
        return self._and_beside(projections, (skipped, total), 2)  # no format of few bits is theirs

    def _and_beside(
        self, projections: tuple[str, ...], counted: tuple[Tensor, Tensor], each: int
    ) -> tuple[Tensor, Tensor]:
        """`counted`, (skipped, total), and with all projections the weights beside them, at `each` a weight."""
        if not set(self.view.projection_names()) <= set(projections):
            return counted
        assert self.tokens is not None
        per_token, (skipped, total) = float(each * self.view.beside * self.view.n_layers), counted
        wasted = self.tokens.new_tensor([0, self.wasted]) * per_token
        return skipped - wasted, total + self.tokens * per_token - wasted

    def _skipped(
        self, projections: tuple[str, ...], touched_of: dict[tuple[int, str], Tensor], each: int
    ) -> tuple[Tensor, Tensor]:
        """(skipped, total) over all layers, of something of which there is one for `each` weights."""
        assert self.tokens is not None
        names = [p for p in self.view.projection_names() if p in projections]
        given = self.tokens - self.tokens.new_tensor([0, self.wasted])
        total = given * float(round(sum(self.view.weights(p) for p in names) * self.view.n_layers) // each)
        touched = sum((v for (_, p), v in touched_of.items() if p in names), torch.zeros_like(total))
        return total - touched, total


def _share(keep: Tensor) -> Share:
    """Of a mask bool [batch, tokens, n]."""
    return Share(count_nonzero(keep).flatten(), keep.shape[-1])


def count_nonzero(x: Tensor) -> Tensor:
    """How many of the last dimension are not zero (NaN is not); float or bool [..., n] to int64 [...], n up to 2**24.

    As `torch.count_nonzero(x, dim=-1)`, which writes an int64 for every element: in half precision on a GPU five times
    the bytes of the activation itself.
    """
    if not x.is_cuda:
        return (x if x.dtype == torch.bool else x != 0).view(torch.uint8).sum(-1, dtype=torch.int32).long()
    if x.dtype == torch.bool:
        return x.half().sum(-1, dtype=torch.float32).long()
    return torch.linalg.vector_norm(x, 0, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)).long()
