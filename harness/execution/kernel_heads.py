"""Kernel execution of KV skipping: one token a sequence through kernels, with masked execution for the rest.

Heads are decided before q, k and v run. Then q makes the rows of kept heads, k and v those of groups with a kept head
(all rows where every K and V must exist), attention reads the entries of those groups that exist, and o reads the
columns of kept heads. What is not made stays zero in the cache.

One token each of several sequences of one length takes the library's projections and the attention kernel, where each
sequence reads the entries of its own groups: unlike weights, the cache is not shared.

With `recompute`, entries of a used group that are missing are made from the kept inputs and written into the cache, for
one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from harness.execution import masked_heads as kv
from harness.execution.kernel import indices
from harness.execution.layouts import replaced, transposed
from harness.execution.masked_heads import Decide, Heads
from harness.model.sees import OUTPUT, Sees
from harness.model.selection import Mask
from harness.model.step import Step
from harness.model.view import View


@contextmanager
def skipping(view: View, sees: Sees, decide: Decide, kv_: str, dropped: str = "exclude") -> Iterator[KernelHeads]:
    """As `masked_heads.skipping`, through kernels. sees: not OUTPUT, which is known only when all work is done."""
    assert sees != OUTPUT, "a decision from outputs leaves nothing to skip"
    heads = KernelHeads(view, sees, decide, kv_, dropped)
    with kv.installed(heads):
        yield heads


class KernelHeads(Heads):
    """The hooks of masked execution, with projections and attention replaced for single tokens."""

    with_kernel = frozenset({"q", "k", "v", "o"})  # projections that have kernels

    def __init__(self, view: View, sees: Sees, decide: Decide, kv_: str, dropped: str) -> None:
        super().__init__(view, sees, decide, kv_, dropped)
        self.stack = ExitStack()
        self.called: set[str] = set()  # of these, the ones whose kernel was called
        # By layer what one step keeps: that step, bool [1, 1, heads], rows of q, rows of k and v (int32).
        self.chosen: dict[int, tuple[Step, Tensor, Tensor, Tensor]] = {}
        self.partly_blind: dict[int, Step] = {}  # by layer, a step whose token does not see all others in the cache
        self.last_mask: tuple[Tensor | None, bool] = None, True  # an attention mask, and whether it hides nothing

    def install(self) -> None:
        """Also replace the forwards of q, k, v and o."""
        super().install()
        for layer, block in enumerate(self.view.blocks):
            see = partial(self._see_mask, layer)
            self.handles.append(block.attn.register_forward_pre_hook(see, with_kwargs=True))
            for name, module in (found for found in block.projections() if found[0] in ("q", "k", "v")):
                self.stack.enter_context(replaced(module, partial(self._rows, layer, name, module)))
            weight = self.stack.enter_context(transposed(block.o))
            zero = torch.zeros((), device=weight.device)
            self.stack.enter_context(replaced(block.o, partial(self._columns, layer, block.o, weight, zero)))

    def remove(self) -> None:
        """Also put forwards and weights back."""
        super().remove()
        self.stack.close()
        self.chosen.clear()
        self.partly_blind.clear()

    def _see_mask(self, layer: int, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Padding and a sliding window that is full are for masked execution."""
        step, mask = self._step(), kwargs["attention_mask"]
        if self.last_mask[0] is not mask:  # one mask serves many layers, and asking it waits for the device
            self.last_mask = mask, mask.shape[-1] > step.past and bool(mask[..., : step.past + 1].all())
        if not self.last_mask[1]:
            self.partly_blind[layer] = step

    def _step(self) -> Step:
        step = self.view.tracker.step
        assert step is not None, "heads are dropped outside of a tracked forward pass"
        return step

    def _single(self, layer: int, x: Tensor) -> bool:
        """One decode token of one sequence that sees all the others, which the method may touch."""
        step = self._step()
        alone = x.numel() == x.shape[-1] and step.sparse is None and step.past > 0
        return alone and self.partly_blind.get(layer) is not step

    def _batch(self, layer: int) -> bool:
        """One decode token each of several sequences that see all the others, which the method may touch."""
        step = self._step()
        tokens = step.valid.shape[1] == 1 and len(step.valid) > 1 and step.sparse is None and step.past > 0
        return tokens and self.kv != "recompute" and self.partly_blind.get(layer) is not step

    def _choose(self, layer: int, x: Tensor) -> tuple[Step, Tensor, Tensor, Tensor]:
        step = self._step()
        chosen = self.chosen.get(layer)
        if chosen is None or chosen[0] is not step:
            self.seen[layer, "k"] = x
            keep = self._decide(layer, None, step)
            heads, groups = (self._rows_of(mask) for mask in (keep, self._used(keep)))
            chosen = self.chosen[layer] = (step, keep, heads, groups)
        return chosen

    def _rows_of(self, keep: Tensor) -> Tensor:
        """Rows int32 of a projection that belong to kept heads or groups [1, 1, n]."""
        within = torch.arange(self.view.head_dim, dtype=torch.int32, device=keep.device)
        return (indices(Mask(keep))[:, None] * self.view.head_dim + within).flatten()

    def _rows(self, layer: int, name: str, module: nn.Linear, x: Tensor) -> Tensor:
        if not self._single(layer, x):
            return F.linear(x, module.weight, module.bias)
        self.called.add(name)
        _, _, heads, groups = self._choose(layer, x)
        if name != "q" and self.kv == "mask_output":
            return kernels.dense_gemv_rows(x, module.weight, module.bias)
        return kernels.row_gemv_index(x, module.weight, heads if name == "q" else groups, module.bias)

    def _columns(self, layer: int, module: nn.Linear, weight: Tensor, zero: Tensor, x: Tensor) -> Tensor:
        if not self._single(layer, x):
            return F.linear(x, module.weight, module.bias)
        self.called.add("o")
        return kernels.column_gemv(x, weight, zero, module.bias)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """Over the entries that exist and whose group is used, in the kernel.

        Masked where the token does not see all the others, and where scores are capped softly, which the kernel can't.
        """
        step, keys = self._step(), key.shape[2]
        chosen = self.chosen.get(layer)
        masked = self.partly_blind.get(layer) is step or kwargs.get("softcap") is not None
        if not masked and chosen is not None and chosen[0] is step:
            keep = chosen[1]
        elif not masked and self._batch(layer):
            keep = self._decide(layer, None, step)
        else:
            return super().attend(layer, query, key, value, attention_mask, **kwargs)
        self.called.add("attention")
        used = self._used(keep)
        read = used.transpose(1, 2)  # one flag for all entries of a group
        if self.kv != "mask_output":
            exists = self._remember(layer, used, step)
            if self.kv == "recompute":
                self._rebuild_in_place(layer, key, value, exists, used, step)
            else:
                read = read & kv.fit(exists, keys)
        length = torch.tensor(step.past + 1, device=query.device)
        out = kernels.decode_attention(query, key, value, length, read, self.dropped, kwargs.get("scaling"))
        return torch.where(keep[..., None], out.transpose(1, 2), 0)

    def _rebuild_in_place(
        self, layer: int, key: Tensor, value: Tensor, exists: Tensor, used: Tensor, step: Step
    ) -> None:
        """Make the missing entries of used groups, one group at a time, and write them into the cache."""
        rotary, kept = self.rotary[layer], self._keep_inputs(layer, step)
        block, width = self.view.blocks[layer], self.view.head_dim
        for group in used.flatten().nonzero().flatten().tolist():
            missing = (~exists[0, group]).nonzero().flatten()
            if not len(missing):
                continue
            rows = slice(group * width, (group + 1) * width)
            for name, module, states in (("k", block.k, key), ("v", block.v, value)):
                assert module is not None, "entries are rebuilt in a block that takes them from another"
                bias = None if module.bias is None else module.bias[rows]
                made = F.linear(kept[name][:, missing], module.weight[rows], bias)
                if name == "k" and rotary is not None:
                    made = kv.rotated(made[:, None], kept["cos"][:, missing], kept["sin"][:, missing])[:, 0]
                states[0, group, missing] = made[0]
        self.entries[layer] = (exists | used.transpose(1, 2)).transpose(1, 2)
