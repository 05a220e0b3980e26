"""Attribution: keep what the model's own loss says matters, by corrected gradient times output (arXiv 2406.06562)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.errors import ConfigError
from harness.execution.masked import install
from harness.execution.method import Method, State
from harness.model.sees import OUTPUT, Sees
from harness.model.selection import TopK
from harness.model.step import Step
from harness.model.view import View
from methods.topk import best

TARGETS = {"mlp": ("neurons",), "heads": ("heads",), "both": ("neurons", "heads")}


@dataclass(frozen=True)
class Attribution(Method):
    """Keeps, for each token, the neurons and heads of highest score; the same share of both. An oracle.

    Score of an output x_i: -g_i x_i + 0.5 |x_i| ||g||_2, g the gradient of the loss in all outputs of the site. The
    first term estimates what removing x_i adds to the loss; the second corrects for neurons depending on each other. A
    head's x is a vector: g x becomes the inner product and |x| the norm.

    The loss is the cross-entropy of the dense model's own next-token distribution with its most likely token. K and V
    count as constants in the gradient, so a token is judged by its own loss alone: with those of later tokens it would
    look into the future, and decoding could not do what scoring does.

    Before every forward pass the same input makes a dense forward pass and a backward pass: about four times the time,
    and memory for all activations and for a dense KV cache beside the model's. It bounds what selection could reach; it
    saves nothing.

    corrected: False leaves the correction out.
    """

    targets: Literal["mlp", "heads", "both"] = "both"
    corrected: bool = True

    name: ClassVar[str] = "attribution"
    paper: ClassVar[str] = "arXiv 2406.06562"

    def __post_init__(self) -> None:
        if self.targets not in TARGETS:
            raise ConfigError(f"method.attribution.targets must be one of {', '.join(TARGETS)}, not {self.targets!r}")

    @property
    def oracle(self) -> bool:
        """It needs a pass over the whole model before the pass."""
        return True

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Neurons and heads."""
        return {} if self.sparsity == 0 else dict.fromkeys(TARGETS[self.targets], OUTPUT)

    def attach(self, view: View, state: State) -> AbstractContextManager[None]:
        """Score and skip until the context ends; afterwards the model is bit for bit what it was."""
        return self._scoring(view)

    @contextmanager
    def _scoring(self, view: View) -> Iterator[None]:
        plan = Plan(view, self)
        if not self.sites:
            yield
            return
        with install(view, self.sites, partial(self.select, plan)):
            handle = view.model.register_forward_pre_hook(plan.score, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

    def select(self, plan: Plan, site: str, layer: int, x: Tensor, step: Step) -> TopK | None:
        """Top-k of the scores of this forward pass; everything while they are being found."""
        scores = plan.scores.get((site, layer))
        return None if scores is None else best(scores, self.sparsity)


@dataclass(eq=False)
class Plan:
    """The scores of the current forward pass, float32 [batch, tokens, n] by (site, layer).

    cache: the dense model's KV cache of the sequence so far. The model's own holds what sparse tokens left.
    """

    view: View
    method: Attribution
    scores: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    cache: Any = None

    def score(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: a dense pass with gradients on the same input."""
        view, step = self.view, self.view.tracker.step
        assert step is not None
        self.scores.clear()
        cache = kwargs.get("past_key_values")
        if cache is not None and step.past > 0:
            cache = self.cache or copy.deepcopy(
                cache
            )  # attached in the middle of a generation: go on from what is there
            if cache.get_seq_length() > step.past:
                cache.crop(step.past - cache.get_seq_length())
        else:
            cache = None
        kwargs = kwargs | {"past_key_values": cache, "logits_to_keep": 0}
        # The ledger counts valid tokens: in this pass there are none.
        view.tracker.step = replace(step, valid=torch.zeros_like(step.valid))
        try:
            with torch.enable_grad(), self._recorded() as outputs:
                out = view.model.forward(*args, **kwargs)
                logits = out.logits.to(view.device)[step.valid].float()
                loss = F.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")
                gradients = torch.autograd.grad(loss, list(outputs.values()))
        finally:
            view.tracker.step = step
        self.cache = out.past_key_values
        for (site, layer), x, g in zip(outputs, outputs.values(), gradients, strict=True):
            width = view.head_dim if site == "heads" else 1
            shape = (*step.valid.shape, -1, width)
            scores = attribution(x.detach().view(shape), g.view(shape), self.method.corrected)
            self.scores[site, layer] = scores.to(view.device)  # where decisions are made

    @contextmanager
    def _recorded(self) -> Iterator[dict[tuple[str, int], Tensor]]:
        """The outputs of the sites as they pass, part of the graph; K and V are cut out of it."""
        outputs: dict[tuple[str, int], Tensor] = {}
        blocks = self.view.blocks

        def start(_: nn.Module, args: tuple) -> tuple:
            return (args[0].detach().requires_grad_(), *args[1:])

        handles = [blocks[0].layer.register_forward_pre_hook(start)]
        for layer, block in enumerate(blocks):
            modules = {"neurons": block.down, "heads": block.o}
            for site in self.method.sites:
                handles.append(
                    modules[site].register_forward_pre_hook(
                        lambda _m, a, key=(site, layer): outputs.__setitem__(key, a[0])
                    )
                )
            for module in (m for name, m in block.projections() if name in ("k", "v")):
                handles.append(module.register_forward_hook(lambda _m, _a, out: out.detach()))
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


def attribution(x: Tensor, gradient: Tensor, corrected: bool = True) -> Tensor:
    """Scores float32 [..., n] of outputs x [..., n, width] with their gradients.

    -g x, plus 0.5 |x| ||g|| if corrected.
    """
    x, gradient = x.float(), gradient.float()
    score = -(gradient * x).sum(-1)
    if not corrected:
        return score
    return score + 0.5 * x.norm(dim=-1) * gradient.flatten(-2).norm(dim=-1, keepdim=True)
