"""KV-cache skipping: heads dropped for a token, and their K and V with them (DejaVu's open question, 2405.09274)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.execution import kernel_heads as kv_kernels
from harness.execution import masked_heads as kv
from harness.execution.masked_heads import Decide
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.sees import INPUT, OUTPUT, Sees
from harness.model.selection import keep_mask, top_k_count
from harness.model.step import Step
from harness.model.view import View
from methods.dejavu import DejaVu
from methods.topk import best, of_position, random_table

SELECT = ("norm", "random", "serial", "lookahead")


@dataclass(frozen=True)
class KvSkip(Method):
    """Keeps the same number of heads for every token; K and V go the way that `kv` says.

    select_by: norm (the L2 norm of the heads' outputs), random, or a predictor of DejaVu's (serial, lookahead).
        The norm is measured with every entry in place, on what this layer is given: it is an oracle, it does not depend
        on what later tokens decide, and stepping and scoring decide alike.
    kv: mask_output (all K and V are kept, the output is zeroed: no KV is lost), recompute (missing K and V are rebuilt
        from the layer's kept input when the group is next used: the same numbers, more time), or skip (they are never
        made: the lossy one).
    dropped: in skip, exclude (a missing entry is left out of the softmax) or zeros (it stays and takes softmax mass).
    unit: head, or group (all query heads of a KV head together). With grouped queries an entry is skipped when every
        query head of its group is, so dropping single heads rarely spares one.
    lookahead, rank, epochs: of the predictor, as in dejavu.
    """

    select_by: Literal["norm", "random", "serial", "lookahead"] = "norm"
    kv: Literal["mask_output", "recompute", "skip"] = "skip"
    dropped: Literal["exclude", "zeros"] = "exclude"
    unit: Literal["head", "group"] = "head"
    lookahead: int = 1
    rank: int = 128
    epochs: int = 6
    seed: int = 0

    name: ClassVar[str] = "kv_skip"
    paper: ClassVar[str] = "arXiv 2405.09274"
    needs: ClassVar[str] = "calibration"

    def __post_init__(self) -> None:
        choices = {"select_by": SELECT, "kv": kv.KV, "dropped": kv.DROPPED, "unit": ("head", "group")}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ConfigError(f"method.kv_skip.{key} must be one of {', '.join(known)}, not {getattr(self, key)!r}")
        for key in ("lookahead", "rank", "epochs"):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1:
                raise ConfigError(
                    f"method.kv_skip.{key} must be a whole number of at least 1, not {getattr(self, key)!r}"
                )

    @property
    def oracle(self) -> bool:
        """Outputs over all entries are known only after the work is done."""
        return self.select_by == "norm"

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Heads, and what the decision sees."""
        if self.sparsity == 0:
            return {}
        if self.predictor is not None:
            return self.predictor.sites
        return {"heads": OUTPUT if self.select_by == "norm" else INPUT}

    @property
    def trains(self) -> bool:
        """A predictor, if there is one."""
        return self.predictor is not None

    @property
    def predictor(self) -> DejaVu | None:
        """The predictor of heads, or None."""
        if self.select_by not in ("serial", "lookahead"):
            return None
        return DejaVu(
            sparsity=self.sparsity,
            targets="heads",
            predictor=self.select_by,
            lookahead=self.lookahead,
            rank=self.rank,
            epochs=self.epochs,
            seed=self.seed,
        )

    def skips(self, view: View) -> frozenset[str]:
        """K and V too where whole groups go. Dropped one by one, heads free a group only now and then."""
        whole = self.unit == "group" or view.group_size == 1
        return super().skips(view) | ({"k", "v"} if self.sites and whole and self.kv != "mask_output" else set())

    def unsupported(self, view: View) -> str | None:
        """Where no KV entry can ever be skipped, or no group dropped."""
        if self.sparsity == 0:
            return None
        topics = {"attention": True, "entries": self.kv != "mask_output", "recompute": self.kv == "recompute"}
        for topic, needed in topics.items():
            if needed and topic in view.limits:
                return f"{self.name} can't run on {view.name}: {view.limits[topic]}"
        if view.n_kv_heads == 1 and (self.unit == "group" or self.kv != "mask_output"):
            return f"{view.name} has one KV group, which every token uses: kv={self.kv} could skip no entry"
        if self.unit == "group" and top_k_count(view.n_kv_heads, self.sparsity) == view.n_kv_heads:
            return f"sparsity {self.sparsity:g} drops none of the {view.n_kv_heads} KV groups of {view.name}"
        n_dropped = view.n_heads - top_k_count(view.n_heads, self.sparsity)
        if self.unit == "head" and self.kv != "mask_output" and n_dropped < view.group_size:
            return (
                f"sparsity {self.sparsity:g} drops {n_dropped} of {view.n_heads} heads, fewer than the "
                f"{view.group_size} of a KV group in {view.name}: kv={self.kv} could skip no entry"
            )
        return None if self.predictor is None else self.predictor.unsupported(view)

    def fit_key(self) -> dict[str, Any]:
        """The predictor's: dejavu and kv_skip share one fit."""
        return super().fit_key() if self.predictor is None else self.predictor.fit_key()

    def fit(self, view: View, calibration: Calibration) -> State:
        """The predictor's state, or nothing."""
        return {} if self.predictor is None else self.predictor.fit(view, calibration)

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """The predictor's own weights."""
        return {} if self.predictor is None else self.predictor.overhead_weights(view, state)

    def attach(self, view: View, state: State) -> AbstractContextManager[None]:
        """Skip heads until the context ends; afterwards the model is bit for bit what it was."""
        if self.sparsity == 0:
            return nullcontext()
        return kv.skipping(view, self.sites["heads"], self._rule(view, state), self.kv, self.dropped)

    @property
    def own_kernels(self) -> bool:
        """Not by the norm: it is known when all heads are done, and nothing is left to skip."""
        return self.sparsity > 0 and self.select_by != "norm"

    def attach_kernels(self, view: View, state: State) -> AbstractContextManager[kv_kernels.KernelHeads]:
        """Skip rows of q, k and v, entries of the cache and columns of o for single tokens."""
        return kv_kernels.skipping(view, self.sites["heads"], self._rule(view, state), self.kv, self.dropped)

    def _rule(self, view: View, state: State) -> Decide:
        if self.predictor is not None:
            with torch.no_grad():
                plan = self.predictor.plan(view, state)
            score: Any = partial(self.predictor.score, plan, "heads")
            return partial(self.decide, view, lambda layer, x, step: torch.sigmoid(score(layer, x, step).float()))
        if self.select_by == "random":
            generator = torch.Generator().manual_seed(self.seed)
            tables = [random_table(view.n_heads, generator).to(view.device) for _ in view.blocks]
            return partial(self.decide, view, lambda layer, x, step: of_position(tables[layer], step))
        return partial(self.decide, view, lambda layer, x, step: head_energy(view, x))

    def decide(self, view: View, score: Any, layer: int, x: Tensor, step: Step) -> Tensor:
        """Heads to keep, bool [batch, tokens, heads]. A group's score is the sum over its heads."""
        scores = score(layer, x, step)
        if self.unit == "group":
            scores = scores.unflatten(-1, (view.n_kv_heads, -1)).sum(-1)
        keep = keep_mask(best(scores, self.sparsity), scores)
        return keep.repeat_interleave(view.group_size, -1) if self.unit == "group" else keep


def head_energy(view: View, x: Tensor) -> Tensor:
    """Squared L2 norms float32 [batch, tokens, heads] of heads' outputs [batch, tokens, heads * head_dim].

    Squared, so that those of a group add up to the group's.
    """
    return x.float().unflatten(-1, (view.n_heads, -1)).square().sum(-1)
