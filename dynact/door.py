"""Attach methods to a loaded model, fit them on text, read what was counted. The runner goes the same way.

A model is any transformers causal language model of a family in harness/model/families, in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dynact.counts import Achieved
from dynact.fits import Fit, facts_of, keys_of
from harness.data.text import token_windows
from harness.errors import ConfigError, UnsupportedError
from harness.execution.attach import Fitted, attached, overhead
from harness.execution.ledger import Ledger
from harness.execution.method import Method, State
from harness.execution.nest import fit_nest, refusal
from harness.fitting.calibration import Calibration
from harness.model import sharding
from harness.model.families import view_of
from harness.model.step import Policy
from harness.model.view import View
from harness.probes.sparsity import rows_of
from harness.run.nest import in_order, incomplete, phase_of, settled

Nest = Method | Sequence[Method]
Texts = str | Sequence[str] | Tensor  # texts, or token windows int64 [n, length] without padding
WINDOW = 512  # tokens of a calibration window, or as many as the model takes or the text has
AT_ONCE = 4  # windows of one forward pass

_counting: dict[int, tuple[Ledger, View, Fitted]] = {}  # by the id of a model that methods are attached to
_counted: WeakKeyDictionary[nn.Module, Achieved] = WeakKeyDictionary()  # of a model, what was counted last


@contextmanager
def attach(
    model: Any,
    methods: Nest,
    *,
    calibration: Texts | Fit | None = None,
    tokenizer: Any = None,
    phase: str = "auto",
    dense_prefix: int = 0,
) -> Iterator[Fit]:
    """Skip what `methods` decide in every forward pass of `model` until the block ends; count what is skipped.

    Execution is masked: the definition of a method, for quality at any batch, not faster. Afterwards the model is bit
    for bit what it was, also after an exception. Padding never counts if the model is given its attention mask.

    methods: one, or several nested ones, outermost first; the sparsity asked for is that of the innermost.
    calibration: what methods learn from, texts or token windows int64 [n, length]; or the `Fit` of an earlier time.
    tokenizer: turns texts into tokens; by default the one that lies where the model was loaded from.
    phase: "all" tokens are sparse, or those of "decode" only; "auto": the first that the methods allow.
    dense_prefix: so many tokens at the start of each sequence stay dense.

    Yields the fit, to be given again as `calibration` (for other sparsities, too) or saved. Raises `ConfigError` for
    bad input and `UnsupportedError` for methods that make no sense on this model.
    """
    view, nest, policy = _opened(model, methods, phase, dense_prefix)
    made = calibration if isinstance(calibration, Fit) else _fit(view, nest, calibration, tokenizer)
    fitted = list(zip(nest, made.states_for(view, nest), strict=True))
    with _noticing_ends(view), attached(view, fitted, policy, count=True) as ledger:
        assert ledger is not None
        _counting[id(model)] = (ledger, view, fitted)
        try:
            yield made
        finally:
            del _counting[id(model)]
            if ledger.tokens is not None:
                _counted[model] = _read(ledger, view, fitted)


def fit(model: Any, methods: Nest, calibration: Texts | None = None, tokenizer: Any = None) -> Fit:
    """What `methods` learn from text, without attaching them: see `attach`."""
    view, nest, _ = _opened(model, methods, "auto", 0)
    return _fit(view, nest, calibration, tokenizer)


def achieved(model: Any) -> Achieved:
    """What was skipped since methods were attached to the model; after the block, what was skipped inside.

    Raises `ConfigError` where nothing was counted.
    """
    if id(model) in _counting:
        ledger, view, fitted = _counting[id(model)]
        if ledger.tokens is not None:
            return _read(ledger, view, fitted)
    elif model in _counted:
        return _counted[model]
    raise ConfigError("nothing was counted: run the model inside of `with dynact.attach(model, ...)` first")


def _read(ledger: Ledger, view: View, fitted: Fitted) -> Achieved:
    return Achieved.of(list(rows_of(view, ledger, overhead(view, fitted))))


def _opened(model: Any, methods: Nest, phase: str, dense_prefix: int) -> tuple[View, list[Method], Policy]:
    """The model's view, the nest and its policy, once all three are known to go together."""
    nest: list[Any] = list(methods) if isinstance(methods, list | tuple) else [methods]
    for method in nest:
        if not isinstance(method, Method):
            hint = f": write {method.__name__}(...)" if isinstance(method, type) else ""
            raise ConfigError(f"{method!r} is not a method{hint}")
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ConfigError(f"a transformers model is needed, not {type(model).__name__}")
    if id(model) in _counting:
        raise ConfigError("methods are attached to this model already: nest them in one list instead")
    if model.training:
        raise ConfigError("the model is in training mode: call model.eval() first")
    if isinstance(dense_prefix, bool) or not isinstance(dense_prefix, int) or dense_prefix < 0:
        raise ConfigError(f"dense_prefix must be a whole number of at least 0, not {dense_prefix!r}")
    if phase not in ("auto", "all", "decode"):
        raise ConfigError(f"phase must be auto, all or decode, not {phase!r}")
    if not nest or (sentence := incomplete(nest)):
        raise ConfigError(sentence if nest else "no method is given")
    nest = [method for part in in_order(settled(nest)) for method in part]
    policy = Policy(phase_of(nest) if phase == "auto" else phase, dense_prefix)
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    view = sharding.with_limits(view_of(model, name=name))
    if sentence := refusal(view, nest, policy.phase):
        raise UnsupportedError(sentence)
    return view, nest, policy


def _fit(view: View, nest: Sequence[Method], calibration: Texts | None, tokenizer: Any) -> Fit:
    wanting = [method.name for method in nest if method.needs == "calibration"]
    if wanting and calibration is None:
        raise ConfigError(f"{'+'.join(wanting)} learns from text: give calibration=")
    windows = None if calibration is None or not wanting else _windows(view, calibration, tokenizer)

    def learn(method: Method, outer: Sequence[Method]) -> State:
        batches = () if windows is None else windows.split(AT_ONCE)
        return method.fit(view, Calibration(view, batches, bare=not outer))

    fitted = fit_nest(view, nest, learn)
    return Fit(facts_of(view), keys_of(nest), [state for _, state in fitted])


def _windows(view: View, calibration: Texts, tokenizer: Any) -> Tensor:
    """int64 [n, length] of calibration text."""
    longest = int(getattr(view.model.config, "max_position_embeddings", None) or WINDOW)
    if isinstance(calibration, Tensor):
        if calibration.dtype != torch.long or calibration.dim() != 2 or not calibration.numel():
            raise ConfigError(f"token windows are int64 [n, length], not {calibration.dtype} {[*calibration.shape]}")
        if calibration.shape[1] > longest:
            raise ConfigError(f"windows of {calibration.shape[1]} tokens are longer than the model's {longest}")
        return calibration
    texts = [calibration] if isinstance(calibration, str) else list(calibration)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ConfigError("calibration is a text, several of them, token windows, or a fit")
    tokenizer = tokenizer or _own_tokenizer(view.model)
    whole = "\n\n".join(texts)
    count = len(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])
    if count < 2:
        raise ConfigError(f"the calibration text has only {count} tokens")
    return token_windows(tokenizer, whole, min(WINDOW, longest, count))


def _own_tokenizer(model: Any) -> Any:
    from transformers import AutoTokenizer

    source = getattr(model.config, "name_or_path", "")
    try:
        if not source:
            raise OSError("the model was not loaded from anywhere")
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError("texts must be tokenized, and no tokenizer lies with the model: give tokenizer=") from error


@contextmanager
def _noticing_ends(view: View) -> Iterator[None]:
    """Tell the tracker, while a batch is generated, which of its sequences have ended.

    `generate` feeds them as long as others go on; alone they would not be fed any more, so that must not count. Enter
    before the methods are attached: hooks run in order.
    """
    ended: Tensor | None = None
    ends = _ends(view.model)

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal ended
        ids, cache = args[0] if args else kwargs.get("input_ids"), kwargs.get("past_key_values")
        if ids is None:
            return
        now = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        if cache is not None and ids.shape[1] == 1 and cache.get_seq_length() > 0:
            now = torch.isin(ids[:, 0], torch.tensor(ends, device=ids.device))
            now = now if ended is None or len(ended) != len(now) else now | ended
        ended = now
        tell(now)

    with view.tracker.generating() as tell:
        handle = view.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _ends(model: Any) -> list[int]:
    """Tokens that are fed only after the end of a sequence."""
    settings = getattr(model, "generation_config", None)
    found: list[int] = []
    for value in (getattr(settings, "eos_token_id", None), getattr(settings, "pad_token_id", None)):
        found += [value] if isinstance(value, int) else list(value or ())
    return found
