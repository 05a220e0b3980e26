"""The method contract: what is skipped, and nothing about how."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.execution.fused_batch import Router
from harness.execution.masked import Decide, install
from harness.fitting.calibration import Calibration
from harness.model.few_bits import Copy
from harness.model.sees import GATE, Sees
from harness.model.selection import PROJECTIONS, SiteSelection
from harness.model.step import Step
from harness.model.view import View

State = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """A dynamic-activation scheme. Fields are its hyper-parameters and its Hydra config.

    Most methods declare `sites` and fill in `select`; those that learn something from text fill in `fit`; those that
    turn what they learnt into something else for a given sparsity fill in `plan`.

    Class facts:
        name: what the user types. paper: where it is from. version: raised when its numbers change.
        sites: site -> what `select` is shown there (see `Sees`). Channel sites always see INPUT.
        needs: "nothing", "calibration" or "training".
        phases: phase policies in which the method means something, the default first.
        batch_coupled: whether rows of a batch influence each other.
        fit_fields: fields that change what `fit` returns. Keep `sparsity` out wherever the maths allows.
    """

    sparsity: float = 0.0

    name: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    phases: ClassVar[tuple[str, ...]] = ("all", "decode")
    batch_coupled: ClassVar[bool] = False
    fit_fields: ClassVar[tuple[str, ...]] = ()
    compensates: ClassVar[bool] = False  # makes up for what the methods beside it drop: fitted last, with them attached
    compensated: ClassVar[bool] = (
        False  # has learnt such compensation itself: another would count what is dropped twice
    )
    wraps: ClassVar[bool] = False  # changes nothing alone: works on what a method that is nested inside drops
    swap: ClassVar[bool] = False  # changes the activation; in a nest the requested sparsity is for the innermost method

    @property
    def sites(self) -> Mapping[str, Sees]:
        """Site -> what `select` sees there."""
        return {}

    @property
    def oracle(self) -> bool:
        """Whether it reads what a deployable method cannot know. Its rows say so."""
        return False

    @property
    def has_level(self) -> bool:
        """Whether `sparsity` sets how much is skipped; a budget of error or trained gates settle it themselves."""
        return True

    @property
    def names_neurons(self) -> bool:
        """Whether it tells neurons apart by their place: learns of single ones, fixes them, or reads their weights."""
        return False

    @property
    def knows_inputs(self) -> bool:
        """Whether it works in the coordinates of what a norm hands to projections."""
        return bool({"attn_in", "mlp_in"} & set(self.sites))

    @property
    def rotates(self) -> bool:
        """Whether it turns the inputs of projections into other coordinates: outside of it nothing may know them."""
        return False

    @property
    def trains(self) -> bool:
        """Whether its fit trains something by gradients, for however short a time: its rows then need training."""
        return False

    @property
    def trained_tokens(self) -> int:
        """Tokens that it was trained on before it came here: of methods that need training."""
        return 0

    @property
    def dense_share(self) -> float:
        """The share of the tokens it may touch that it has the dense model compute."""
        return 0.0

    @property
    def makes_experts(self) -> bool:
        """Whether it makes experts, whose use can be counted."""
        return type(self).usage is not Method.usage

    def skips(self, view: View) -> frozenset[str]:
        """Projections of which the level `sparsity` skips that share of the weights: what scope=model reckons with.

        A channel site skips columns of its projections; neurons skip rows of gate and up (of up alone where the
        decision reads the whole gate) and columns of down; heads skip rows of q and columns of o.
        """
        skipped: set[str] = set()
        for site, sees in self.sites.items():
            if site == "neurons":
                skipped |= {"up", "down"} if sees == GATE else {"gate", "up", "down"}
            elif site == "heads":
                skipped |= {"q", "o"}
            elif site != "kv":  # of the cache no weights are spared
                skipped |= set(PROJECTIONS[site])
        return frozenset(skipped)

    def refusal(self, view: View) -> str | None:
        """One sentence why it can't run on this model, by what the model rules out or by its own word, or None."""
        ruled_out = {"neurons": self.names_neurons, "heads": "heads" in self.sites}
        for topic, wanted in ruled_out.items():
            if wanted and topic in view.limits:
                return f"{self.name} can't run on {view.name}: {view.limits[topic]}"
        return self.unsupported(view)

    def unsupported(self, view: View) -> str | None:
        """One sentence why this method makes no sense on this model, or None."""
        if self.sites.get("neurons") == GATE and not view.gated:
            return f"{self.name} decides from the gate, and the MLP of {view.name} has none"
        return None

    def fit(self, view: View, calibration: Calibration) -> State:
        """Learn from calibration text. Tensors only; cached by content."""
        return {}

    def plan(self, view: View, state: State) -> Any:
        """What the fitted state comes to at this sparsity; handed to every `select` while attached."""
        return state

    def select(self, plan: Any, site: str, layer: int, x: Tensor, step: Step) -> SiteSelection:
        """Decide what to keep at a site of a block for x [batch, tokens, channels]. None keeps everything."""
        raise NotImplementedError(f"{type(self).__name__} declares sites but no select")

    def usage(self, view: View, state: State, batches: Iterable[Tensor]) -> Tensor:
        """How often text uses each expert, float32 [layers, experts]; of methods that make experts.

        batches: token windows int64 [batch, length] without padding.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no experts")

    def overhead_weights(self, view: View, state: State) -> Mapping[str, int]:
        """Weights that deciding itself touches for each token, over all blocks: {"mlp": n, "attn": n}."""
        return {}

    def attach(self, view: View, state: State) -> AbstractContextManager[None]:
        """Skip what `select` decides until the context ends; afterwards the model is bit for bit what it was."""
        return self._attach(view, state)

    @property
    def own_kernels(self) -> bool:
        """Whether `attach_kernels` runs it: for methods that attach in a way of their own."""
        return False

    def attach_kernels(self, view: View, state: State) -> AbstractContextManager[Any]:
        """As `attach`, through kernels; yields an object whose `residual` maps layers to the residual stream."""
        raise NotImplementedError(f"{type(self).__name__} has no kernels of its own")

    def routers(self, view: View, state: State) -> Mapping[int, Router] | None:
        """By layer the linear router that picks the KV heads of each sequence, where it comes to that alone."""
        return None

    def guesses(self, view: View, plan: Any) -> Mapping[int, tuple[Copy, Tensor]]:
        """By layer the copy in few bits, and the threshold on what it gives (0-d or [neurons]), where neurons come to
        that alone. plan: of `plan`.
        """
        return {}

    def rewrite(self, view: View, state: State) -> AbstractContextManager[Any]:
        """What the method changes in the model itself, reversibly: a rotation, an activation. Default: nothing."""
        return nullcontext()

    def decider(self, view: View, state: State) -> Decide:
        """`select` with the plan for this state already in hand."""
        with torch.no_grad():
            plan = self.plan(view, state)
        return partial(self.select, plan)

    @contextmanager
    def _attach(self, view: View, state: State) -> Iterator[None]:
        with self.rewrite(view, state):
            with install(view, self.sites, self.decider(view, state)):
                yield

    def fit_key(self) -> dict[str, Any]:
        """What identifies a fit of this method beside the model and the data."""
        return {"method": self.name, "version": self.version} | {f: getattr(self, f) for f in self.fit_fields}

    def variant(self) -> str:
        """Hyper-parameters that differ from their defaults, sparsity aside: "allocation=greedy"."""
        changed = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.name != "sparsity"}
        return ",".join(f"{name}={_as(own, default)}" for name, (own, default) in changed.items() if own != default)


def _as(value: Any, default: Any) -> Any:
    """A number as its default is written: 0 and 0.0 are one option, and rows of both must meet."""
    return float(value) if isinstance(default, float) and isinstance(value, int) else value
