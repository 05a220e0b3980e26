"""The fused decode step on a CPU: one token of one sequence runs in C++, on the module's own weights and cache.

The Hugging Face module stays the definition: prompts, batches and whatever the step does not know take its own path,
masked. Where inputs are kept by their size (thresholds, the k largest), a step is one call; where a method decides by
anything else, the step stops before the stage that the decision is about and asks it. What a rewrite declares to change
at a module (changes.py) runs in C++ too. With `packed` weights the module holds what they stand for meanwhile, so that
it is the definition of the low-bit step too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from harness.errors import UnsupportedError
from harness.execution.attach import Fitted
from harness.execution.changes import Change, LowRank, Moved, Turned, change_of
from harness.execution.fixed import Largest, as_largest, as_threshold, probes_of
from harness.execution.fused_step import ACTIVATIONS, FAMILIES, slides
from harness.execution.kernel import has_kernels, indices
from harness.execution.layouts import replaced, transposed
from harness.execution.masked import Installation, install, own_selection
from harness.execution.method import Method
from harness.model.activations import ACTIVATIONS as GATED
from harness.model.families.outputs import output
from harness.model.few_bits import Copy
from harness.model.sees import GATE, OUTPUT, Sees
from harness.model.selection import PROJECTIONS, Mask, Selection, Thresholds, TopK, keep_mask
from harness.model.step import Policy
from harness.model.step import Step as Pass
from harness.model.view import View
from kernels.cpu.build import load_extension
from kernels.cpu.step import BEFORE, STAGES, Step
from kernels.lowbit import Packed, pack

PER_LAYER = len(STAGES)
# What a method sees of a layer, by site: the buffer that holds it when it is asked.
SEEN = {"attn_in": "normed", "attn_out": "attended", "mlp_in": "normed", "mlp_hidden": "hidden"}
PANEL = range(128, 2561)  # outputs of a panel of the packed head: its sums stay in the first-level cache
# By (layer, projection), and (-1, "head") unless it stays as it is.
PackedWeights = Mapping[tuple[int, str], Packed]


def unfit(view: View) -> str | None:
    """Why the fused step can't run this model, or None."""
    if view.family not in FAMILIES:
        return f"the fused CPU step knows Llama-like blocks only, not the {view.family} family"
    if view.device.type != "cpu":
        return f"the fused CPU step runs on a CPU, not on {view.device.type}"
    if view.dtype not in (torch.float32, torch.bfloat16):
        return f"the fused CPU step runs in float32 or bfloat16, not {view.dtype}"
    if view.activation not in ACTIVATIONS and view.activation not in GATED:
        return f"no kernel for the activation {view.activation!r}"
    rotary = getattr(view.model.base_model, "rotary_emb", None)
    if rotary is None or getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):
        return "the fused CPU step needs rotary angles that depend on the position alone"
    if slides(view):
        return "the fused CPU step knows no sliding windows"
    if not load_extension():
        return "the fused CPU step needs the C++ kernels"
    return None


def unfit_methods(methods: Fitted) -> str | None:
    """Why the fused step can't run these methods, or None."""
    selecting = [method for method, _ in methods if method.sites]
    for method in selecting:
        if method.own_kernels:
            return (
                f"{method.name} leaves holes in the cache or in what is read of it, which the fused CPU step does not "
                f"know"
            )
        if not has_kernels(method):
            return f"{method.name} has no kernel: only masked execution"
    sites = [site for method in selecting for site in method.sites]
    if len(sites) != len(set(sites)):
        return "two methods decide at one site, and the fused CPU step takes one decision there"
    return None


def by_columns(methods: Fitted) -> frozenset[str]:
    """The projections whose input channels are skipped: they lie transposed, the others as they are."""
    found: set[str] = set()
    for method, _ in methods:
        for site in method.sites:
            found |= set(PROJECTIONS.get(site, ())) | {"neurons": {"down"}, "heads": {"o"}}.get(site, set())
    return frozenset(found)


def by_rows(methods: Fitted) -> frozenset[str]:
    """The projections of which outputs are skipped: in low bits their lines are outputs."""
    found: set[str] = set()
    for method, _ in methods:
        found |= {"gate", "up"} if "neurons" in method.sites else set()
        found |= {"q"} if "heads" in method.sites else set()
    return frozenset(found - by_columns(methods))


def panel_of(outputs: int, bits: int) -> int | None:
    """Outputs of a panel of the head, a divisor of all; None if none fits.

    The cheapest by the lines' padding and by what it costs to begin a line, about as much as 256 weights.
    """
    chunk = 512 // bits  # weights of a cache line
    fits = [width for width in PANEL if outputs % width == 0]
    return min(fits, key=lambda width: -(-width // chunk) * chunk / width * (1 + 256 / width), default=None)


def packed_weights(view: View, bits: int, methods: Fitted = (), head: bool = True) -> dict[tuple[int, str], Packed]:
    """All projections, and the head if asked for, in int4 or int8, with lines as these methods skip them."""
    rows = by_rows(methods)
    found = {
        (layer, name): pack(module.weight if name in rows else module.weight.t(), bits)
        for layer, block in enumerate(view.blocks)
        for name, module in block.projections()
    }
    if head:
        weight = view.model.get_output_embeddings().weight
        found[-1, "head"] = pack(weight.t(), bits, panel_of(weight.shape[0], bits))
    return found


@contextmanager
def dequantised(view: View, packed: PackedWeights, methods: Fitted = ()) -> Iterator[None]:
    """The module holds the values of packed weights, in its own type, until the context ends."""
    rows, saved = by_rows(methods), []
    head = view.model.get_output_embeddings()
    modules = {
        (layer, name): module for layer, block in enumerate(view.blocks) for name, module in block.projections()
    } | {(-1, "head"): head}
    try:
        for key, module in modules.items():
            if key not in packed:  # a head that stays as it is
                continue
            values = packed[key].values().to(view.dtype)
            values = values if key[1] in rows else values.t()
            saved.append((module, module.weight))  # the parameter itself: the head's may be the embedding's too
            module.weight = nn.Parameter(values.contiguous(), requires_grad=False)
        yield
    finally:
        for module, weight in saved:
            module.weight = weight


@contextmanager
def fused_decode(
    view: View, methods: Fitted = (), policy: Policy | None = None, packed: PackedWeights | None = None
) -> Iterator[FusedStep]:
    """While the context lasts, one-token steps of `view.model` with a `StaticCache` run fused; other calls are masked.

    packed: of `packed_weights` for these methods. Raises UnsupportedError where the step fits model or methods not.
    """
    reason = unfit(view) or unfit_methods(methods)
    if reason is not None:
        raise UnsupportedError(reason)
    with ExitStack() as stack:
        stack.enter_context(view.tracker.tracking(policy or Policy()))
        if packed is not None:
            stack.enter_context(dequantised(view, packed, methods))
        own = _weights_at(view)
        for method, state in methods:
            stack.enter_context(method.rewrite(view, state))
        reason = unfit(view) or hooked(view, declared=True) or unfit_changes(view, methods)  # in what rewrites made
        if reason is None and packed is not None and own != _weights_at(view):
            reason = "the method has weights of its own, and the packed ones are the model's"
        if reason is not None:
            raise UnsupportedError(reason)
        columns, changes = by_columns(methods), _changes(view)
        if packed is None:
            for block in view.blocks:
                for name, module in block.projections():
                    if name in columns:
                        stack.enter_context(transposed(module))
        installations: list[tuple[Method, Installation]] = []
        guesses: dict[int, tuple[Copy, Tensor]] = {}
        for method, state in methods:
            if method.sites:
                with torch.no_grad():
                    plan = method.plan(view, state)
                decide = partial(method.select, plan)
                installations.append((method, stack.enter_context(install(view, method.sites, decide))))
                guesses |= method.guesses(view, plan)
        step = FusedStep(view, installations, columns, packed, by_rows(methods), changes, guesses)
        stack.enter_context(replaced(view.model, step.forward_of(view.model.forward)))
        yield step


def hooked(view: View, declared: bool = False) -> str | None:
    """Why a model that methods have rewritten is not all in its parameters, or None.

    declared: what says what it changes, where the fused CPU step can do that, is no reason.
    """
    relu_on_up = view.activation in GATED and GATED[view.activation].relu_on_up
    for layer, block in enumerate(view.blocks):
        known: dict[nn.Module, tuple[type, ...]] = {}
        if declared:
            known |= dict.fromkeys(view.norms[layer], (Turned,))
            known |= {module: (Moved, LowRank) for _, module in block.projections()}
        for module in block.layer.modules():
            hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
            if not hooks or (module is block.up and relu_on_up and hooks == 1):
                continue
            if not isinstance(change_of(module), known.get(module, ())):
                return "the method puts hooks of its own into the blocks, which the fused step does not run"
    return None


def _changes(view: View) -> dict[tuple[int, str], Change]:
    """What rewrites declare to change, by (layer, projection, or site before which a norm is)."""
    places = {
        (layer, name): module
        for layer, block in enumerate(view.blocks)
        for name, module in [*zip(("attn_in", "mlp_in"), view.norms[layer], strict=True), *block.projections()]
    }
    return {at: change for at, module in places.items() if (change := change_of(module)) is not None}


def unfit_changes(view: View, methods: Fitted) -> str | None:
    """Why what rewrites declare to change at projections does not go with where methods decide, or None."""
    if all(isinstance(change, Turned) for change in _changes(view).values()):
        return None
    if any(site in ("neurons", "heads") for method, _ in methods for site in method.sites):
        return "the fused CPU step changes what projections read or give only where no neurons or heads are dropped"
    return None


def _weights_at(view: View) -> list[int]:
    return [module.weight.data_ptr() for block in view.blocks for _, module in block.projections()]


@dataclass
class Stop:
    """A stage before which something is asked or kept."""

    stage: int
    act: Callable[[], None]


class FusedStep:
    """The C++ step of a view, with the decisions of the attached methods."""

    def __init__(
        self,
        view: View,
        installations: list[tuple[Method, Installation]],
        columns: frozenset[str],
        packed: PackedWeights | None,
        rows: frozenset[str],
        changes: Mapping[tuple[int, str], Change],
        guesses: Mapping[int, tuple[Copy, Tensor]],
    ) -> None:
        """By layer: guesses. By layer and projection (or site before which a norm is): changes, as rewrites say."""
        self.view, self.changes = view, changes
        block = view.blocks[0]
        act = ACTIVATIONS.get(view.activation, "relu")  # fatrelu and drelu are ReLUs
        self.step = Step(
            view.n_layers, view.n_heads, view.n_kv_heads, view.head_dim, view.d_ff, act, view.dtype, block.attn.scaling
        )
        self._weights(columns, packed, rows)
        self.fused = 0  # steps that ran here
        self.cache: StaticCache | None = None
        self.residual: dict[int, Tensor] = {}
        self.last: dict[tuple[int, str], Any] = {}  # the selection that a slot holds
        self.guesses = guesses
        stops = [stop for _, installation in installations for stop in self._stops(installation)]
        self.stops = sorted(stops, key=lambda stop: stop.stage)

    def _weights(self, columns: frozenset[str], packed: PackedWeights | None, rows: frozenset[str]) -> None:
        view, step = self.view, self.step
        for layer, block in enumerate(view.blocks):
            first, second = view.norms[layer]
            step.norms(layer, first.weight, first.variance_epsilon, second.weight, second.variance_epsilon)
            gated = GATED.get(view.activation)
            cut = torch.as_tensor(getattr(block.act, "threshold", 0.0)).to(view.dtype)
            step.activation(layer, float(cut), gated is not None and gated.relu_on_up)
            for name, module in block.projections():
                bias = module.bias
                if packed is not None:
                    step.packed(layer, name, packed[layer, name], name not in rows, bias)
                elif name in columns:
                    step.weight(layer, name, module.weight.t(), True, bias)
                else:
                    step.weight(layer, name, module.weight, False, bias)
        self._change()
        final = view.final_norm
        assert final is not None
        step.final_norm(final.weight, final.variance_epsilon)
        head = view.model.get_output_embeddings()
        if packed is not None and (-1, "head") in packed:
            step.packed(-1, "head", packed[-1, "head"], True, head.bias)
        else:
            step.weight(-1, "head", head.weight, False, head.bias)

    def _change(self) -> None:
        for (layer, name), change in self.changes.items():
            if isinstance(change, Turned):
                self.step.turn(layer, name, change.basis)
            elif isinstance(change, Moved):
                self.step.centre(layer, name, change.centre)
            else:
                self.step.low_rank(layer, name, change.out, change.into)

    # --- decisions

    def _stops(self, installation: Installation) -> Iterator[Stop]:
        for site, sees in installation.sites.items():
            for layer in range(self.view.n_layers):
                at = layer * PER_LAYER
                if site in PROJECTIONS:
                    if self._static(installation, site, layer, self.view.channels(PROJECTIONS[site][0])):
                        continue
                    if any(isinstance(self.changes.get((layer, name)), Moved) for name in PROJECTIONS[site]):
                        raise UnsupportedError("the fused CPU step selects from moved inputs by their size only")
                    yield Stop(at + BEFORE[site], lambda s=site, n=layer: self._channels(installation, s, n))
                    continue
                if sees == GATE and self._static(installation, site, layer, self.view.d_ff):
                    continue
                if site == "neurons" and self._guess(layer):
                    continue
                if sees.point == "residual":
                    yield Stop(at, lambda n=layer: self._keep(n))
                if sees == GATE:
                    yield Stop(at + BEFORE["neurons"], lambda n=layer: self.step.index(n, "neurons", None))
                late = {"neurons": "mlp_hidden", "heads": "attn_out"}[site] if sees == OUTPUT else site
                stage = BEFORE["gate" if sees == GATE else late]
                yield Stop(at + stage, lambda s=site, v=sees, n=layer: self._rows(installation, s, v, n))

    def _keep(self, layer: int) -> None:
        self.residual[layer] = self._seen("residual").clone()

    def _seen(self, buffer: str) -> Tensor:
        return self.step.buffer(buffer).view(1, 1, -1).to(self.view.dtype)

    def _static(self, installation: Installation, site: str, layer: int, channels: int) -> bool:
        """Set what is the same whatever is seen: thresholds, or how many channels stay, by magnitude and fixed weights.

        False where something else is decided for each token.
        """
        yes = torch.ones(1, 1, dtype=torch.bool)
        asked = Pass(valid=yes, decode=yes, position=yes.long(), sparse=None, past=1, input_ids=None)
        probes = [x.to(self.view.dtype) for x in probes_of(channels)]
        answers = [installation.decide(site, layer, x, asked) for x in probes]
        names = PROJECTIONS.get(site, ("neurons",))
        limits: dict[str, Thresholds | Largest | None] = {}
        for name in names:
            own = [own_selection(answer, name) for answer in answers]
            if all(selection is None for selection in own):
                limits[name] = None
            elif (threshold := as_threshold(own)) is not None:
                limits[name] = threshold
            elif name != "neurons" and (largest := as_largest(own, probes)) is not None:
                limits[name] = largest
            else:
                return False
        for name, limit in limits.items():
            if name != "neurons" and getattr(self.view.blocks[layer], name) is None:
                continue
            if isinstance(limit, Largest):
                self.step.top(layer, name, limit.k, limit.worth)
            else:
                self.step.limit(layer, name, None if limit is None else limit.t)
        if site == "neurons":
            self.step.limit(layer, "down", 0.0)
        return True

    def _guess(self, layer: int) -> bool:
        """Let the step choose a layer's neurons itself, where a copy that it can read decides."""
        copy, t = self.guesses.get(layer, (None, None))
        if copy is None or t is None or copy.gate is None or self.view.activation not in ACTIVATIONS:
            return False
        gate, up = copy.gate, copy.up
        if not isinstance(gate.codes, Packed) or not isinstance(up.codes, Packed):
            return False
        biases = (copy.gate_bias, copy.up_bias)
        self.step.guess(layer, (gate.codes, up.codes), (gate.scale, up.scale), biases, copy.cut, t)
        self.step.limit(layer, "down", 0.0)  # what was not computed is zero
        return True

    def _channels(self, installation: Installation, site: str, layer: int) -> None:
        selection = installation.decide(site, layer, self._seen(SEEN[site]), installation.step)
        lists: dict[int, Tensor] = {}  # by selection: q, k and v (gate and up) mostly share one
        for name in PROJECTIONS[site]:
            self._set(layer, name, own_selection(selection, name), lists)

    def _set(self, layer: int, name: str, selection: Selection | None, lists: dict[int, Tensor]) -> None:
        before = self.last.get((layer, name), self)
        if before is selection:
            return
        self.last[layer, name] = selection
        listed = isinstance(selection, Mask | TopK)
        if not listed or not isinstance(before, Mask | TopK):  # what changes from list to list is the list alone
            self.step.limit(layer, name, selection.t if isinstance(selection, Thresholds) else None)
        if isinstance(selection, Mask | TopK) and id(selection) not in lists:
            lists[id(selection)] = indices(selection)
        self.step.index(layer, name, lists[id(selection)] if listed else None)

    def _rows(self, installation: Installation, site: str, sees: Sees, layer: int) -> None:
        if sees.point == "residual":
            x = self.residual[max(0, layer - sees.blocks_back)]
        else:
            late = {"gate": "gate", "output": "hidden" if site == "neurons" else "attended"}
            x = self._seen(late.get(sees.point, "normed"))
        selection = installation.decide(site, layer, x, installation.step)
        if sees != GATE and self.last.get((layer, site), self) is selection:
            return
        self.last[layer, site] = selection
        assert selection is None or isinstance(selection, Mask | TopK | Thresholds)
        kept = None if selection is None else indices(_listed(selection, x))
        down = "down" if site == "neurons" else "o"
        if sees == OUTPUT:  # all is computed; the decision says what is read of it
            if kept is not None and site == "heads":
                kept = (kept[:, None] * self.view.head_dim + torch.arange(self.view.head_dim)).flatten().int()
            self.step.index(layer, down, kept)
            return
        self.step.index(layer, site, kept)
        self.step.limit(layer, down, None if kept is None else 0.0)  # what was not computed is zero

    # --- the step

    def forward_of(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """A forward for the model: fused where it can be, else `own`."""

        def forward(input_ids: Tensor | None = None, past_key_values: Any = None, **kwargs: Any) -> Any:
            if input_ids is None or not self._fits(input_ids, past_key_values, kwargs):
                return own(input_ids=input_ids, past_key_values=past_key_values, **kwargs)
            return output(self(input_ids, past_key_values), past_key_values)

        return forward

    def _fits(self, input_ids: Tensor, cache: Any, kwargs: dict[str, Any]) -> bool:
        if input_ids.numel() != 1 or not isinstance(cache, StaticCache) or kwargs.get("attention_mask") is not None:
            return False
        if any(kwargs.get(name) for name in ("output_hidden_states", "output_attentions", "labels")):
            return False
        sparse = self.view.tracker.step.sparse if self.view.tracker.step is not None else None
        return all(layer.is_initialized for layer in cache.layers) and (sparse is None or bool(sparse.all()))

    def bind(self, cache: StaticCache) -> None:
        """Decode into this cache from now on."""
        if self.cache is cache:
            return
        capacity = cache.layers[0].max_cache_len
        rotary = self.view.model.base_model.rotary_emb
        cos, sin = rotary(torch.zeros(1, 1, 1, dtype=self.view.dtype), torch.arange(capacity)[None])
        self.step.rotary(cos[0], sin[0])
        layers = cache.layers
        self.step.cache([c.keys for c in layers], [c.values for c in layers], [c.cumulative_length for c in layers])
        self.cache = cache

    def run(self, first: int, last: int) -> None:
        """Stages first to last, with what is decided on the way."""
        at = first
        for stop in self.stops:
            if first <= stop.stage < last:
                if stop.stage > at:
                    self.step.run(at, stop.stage)
                    at = stop.stage
                stop.act()
        self.step.run(at, last)

    @torch.no_grad()
    def __call__(self, token: Tensor, cache: StaticCache) -> Tensor:
        """Logits [1, 1, vocabulary] after a token (int64, one element); the cache holds it afterwards."""
        self.bind(cache)
        self.step.begin(self.view.model.get_input_embeddings().weight[int(token)])
        self.run(0, self.step.stages)
        self.fused += 1
        return self.step.buffer("logits")


def _listed(selection: Selection, x: Tensor) -> Selection:
    return Mask(keep_mask(selection, x)) if isinstance(selection, Thresholds) else selection
