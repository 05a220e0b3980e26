"""What a process keeps between the cells of a sweep beside the loaded model: texts and calibration.

Basic Hydra sweeps run every cell in one process. A model is loaded once, calibration text is passed through it once for
what a fit asks, and a fit is made once (the store keeps it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from harness.data import tasks, text
from harness.data.own_tasks import source_of
from harness.data.token_bytes import tokens_and_bytes
from harness.errors import ConfigError
from harness.execution.attach import Fitted
from harness.execution.method import Method, State
from harness.execution.nest import behaviour, fit_nest
from harness.fitting.calibration import Calibration
from harness.fitting.scratch import Scratch
from harness.model.step import Policy
from harness.results.fits import Learnt
from harness.results.identity import content_key
from harness.results.rows import OF_ALL
from harness.results.store import Store
from harness.run import probing
from harness.run.config import CellConfig
from harness.run.loading import Loaded, load, tokenizer_of, vocabulary
from harness.run.nest import in_order
from harness.run.scope import CLOSE, to_achieved, to_native

__all__ = ["Loaded", "calibration_windows", "check_tokens", "evaluation_windows", "fitted", "load"]


Names = tuple[str, ...]  # of texts
COUNTED = 8  # windows of calibration text that a level is counted on
LETTERS_A_TOKEN = 5  # of English, a little more than tokenizers need: enough text for so many tokens


def check_tokens(config: CellConfig) -> None:
    """Raise `ConfigError` where the tokenizer lacks what the tasks need, or a text is shorter than what is asked of it.

    Loads the tokenizer, not the model.
    """
    _check_special(config)
    tokenizer, probe = tokenizer_of(config), config["probe"]
    if asked := probing.windows(probe):
        perplexity = probe["perplexity"]
        _check_length(tokenizer, perplexity["path"], None, perplexity["window"], asked)
    asked_for = [(None, *text) for text in probing.texts(probe)]
    if learnt := config["calibration"]:
        asked_for.append((learnt["path"], learnt["text"], learnt["tokens"], learnt["window"]))
    for path, name, tokens, window in asked_for:
        _check_length(tokenizer, path, _names(name), window, tokens // window)


def _check_special(config: CellConfig) -> None:
    """Whether texts can begin and end, and answers of a batch be padded, as lm-eval does it."""
    names = config["tasks"]["names"] or []
    if not names or not {"quality", "search"} & set(config["probe"]["names"]):
        return
    tokenizer = tokenizer_of(config)
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {config.model_name} has no token for the beginning or the end of a text, which tasks "
            "need: name one in its tokenizer_config.json (eos_token)"
        )
    generated = [name for name in names if tasks.generates(name, source_of(config))]
    if not generated:
        return
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {config.model_name} has no token for the end of a text (eos_token), by which the "
            f"answers of {generated[0]} end: name one in its tokenizer_config.json"
        )
    padding = next(t for t in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) if t is not None)
    size = vocabulary(config)
    if size is not None and padding >= size:
        raise ConfigError(
            f"the tokenizer of {config.model_name} pads with token {padding}, but the model knows {size} tokens only: "
            "name another pad_token in its tokenizer_config.json"
        )


def evaluation_windows(loaded: Loaded, perplexity: dict[str, Any], count: int) -> text.Windows:
    """Held-out text in non-overlapping windows."""
    return _evaluation_windows(loaded.tokenizer, perplexity, count)


def calibration_windows(loaded: Loaded, calibration: dict[str, Any]) -> Tensor:
    """int64 [n, window] of calibration text; raises `ConfigError` where the text is too short."""
    return _calibration_windows(loaded.tokenizer, calibration)


def _evaluation_windows(tokenizer: Any, perplexity: dict[str, Any], count: int) -> text.Windows:
    return _windows(tokenizer, perplexity["path"], None, perplexity["window"]).first(count, "perplexity")


def _calibration_windows(tokenizer: Any, calibration: dict[str, Any]) -> Tensor:
    windows = _windows(tokenizer, calibration["path"], _names(calibration["text"]), calibration["window"])
    count = calibration["tokens"] // calibration["window"]
    if calibration.get("seed") is not None:
        windows = windows.drawn(calibration["seed"])
    return windows.first(count, "calibration").tokens


def _names(text: str | list[str]) -> Names:
    """Of one text or several."""
    return (text,) if isinstance(text, str) else tuple(text)


@lru_cache(maxsize=64)
def _check_length(tokenizer: Any, path: str | None, calibration: Names | None, length: int, count: int) -> None:
    """Raise `ConfigError` where a text has fewer windows than `count`.

    Most texts are far longer than what is asked of them: a beginning that holds enough says so in a fraction of the
    time. Where it does not, all of the text is cut.
    """
    if path or calibration is None or len(calibration) == 1:
        raw = _raw(path, calibration[0] if calibration else None)
        beginning = raw[: LETTERS_A_TOKEN * (count + 1) * length]
        if len(beginning) < len(raw):
            tokens = tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"]
            if len(tokens) >= (count + 1) * length:  # a window more, because a cut text may end in other tokens
                return
    _windows(tokenizer, path, calibration, length).first(count, _asker(calibration))


@lru_cache(maxsize=16)
def _windows(tokenizer: Any, path: str | None, calibration: Names | None, length: int) -> text.Windows:
    """All windows of a text, or of several in turns. Tokenizing a million characters takes seconds: once a process."""
    names = (None,) if path or calibration is None else calibration
    return text.in_turns(
        [text.cut(*_tokens(tokenizer, path, name), length, what=_asker(calibration)) for name in names]
    )


@lru_cache(maxsize=4)
def _tokens(tokenizer: Any, path: str | None, calibration: str | None) -> tuple[list[int], list[int] | None]:
    """One text's tokens, whatever the lengths of windows that are cut from it."""
    return tokens_and_bytes(tokenizer, _raw(path, calibration))


def _raw(path: str | None, calibration: str | None) -> str:
    if path:
        return text.own_text(path)
    return text.evaluation_text() if calibration is None else text.calibration_text(calibration)


def _asker(calibration: Names | None) -> str:
    return "perplexity" if calibration is None else "calibration"


def fitted(loaded: Loaded, methods: list[Method], config: CellConfig, store: Store) -> Fitted:
    """Every nested method with its state, at the level that the cell runs it at.

    Those that compensate for the others come last, wherever the user wrote them: what they learn depends on what the
    others drop at their final level. A fit is identified by whatever its numbers come from: the model, its dtype and
    the processor, the text, the methods outside with all of their options, and the method's own fit key.
    """
    view = loaded.view

    def learn(method: Method, outer: Sequence[Method]) -> State:
        calibration, text_facts = _calibration(loaded, config, behaviour(outer))
        key = content_key(text_facts | {"fit": method.fit_key()})
        folder = store.root / "fits" / f"{key}.layers"
        calibration.scratch = Scratch(folder)
        calibration.used = folder.exists()  # a fit that goes on where another stopped has layers that saw the text

        def tokens() -> int:
            return calibration.tokens if calibration.used else 0

        state = store.fits.get(key, lambda: method.fit(view, calibration), tokens)
        calibration.scratch.clear()
        if view.device.type == "cuda":  # there a pass is quick, and gigabytes are what other processes lack
            calibration.forget()
        return state

    droppers, repairs = in_order(methods)
    done = fit_nest(view, droppers, learn)
    if config["scope"] in OF_ALL:
        done = to_native(view, done, config["sparsity"])
    done = fit_nest(view, repairs, learn, done) if repairs else done
    if config["scope"] == "achieved":  # repairs and all, which change what is skipped
        policy = Policy(config["phase"], config["dense_prefix"])
        windows = calibration_windows(loaded, config["calibration"])[:COUNTED]
        done = to_achieved(
            view, done, config["sparsity"], policy, windows, partial(_level, loaded, config, store, done)
        )
    return done


def _level(loaded: Loaded, config: CellConfig, store: Store, methods: Fitted, solve: Callable[[], float]) -> float:
    """The level that these methods, at that of arithmetic, are to run at: counted once for all cells that want it."""
    asked = {"counted": config["sparsity"], "phase": config["phase"], "dense_prefix": config["dense_prefix"]}
    asked |= {"windows": COUNTED, "close": CLOSE, "fits": [method.fit_key() for method, _ in methods]}
    key = content_key(_facts(loaded, config, behaviour([method for method, _ in methods])) | asked)
    return store.fits.get(key, lambda: {"level": torch.tensor(solve(), dtype=torch.float64)})["level"].item()


def needed(loaded: Loaded, fitted: Fitted, config: CellConfig) -> dict[str, Any]:
    """The row columns that say what these methods had to be given: the most that any of them needs, and the text."""
    found: dict[str, int] = {"nothing": 0}
    for method, state in fitted:
        learnt = state.tokens if isinstance(state, Learnt) else 0
        if method.needs == "training" or (method.trains and learnt):
            found["training"] = max(found.get("training", 0), learnt or method.trained_tokens)
        elif learnt:
            found["calibration"] = max(found.get("calibration", 0), learnt)
    most = next(kind for kind in ("training", "calibration", "nothing") if kind in found)
    columns: dict[str, Any] = {"needs": most, "needs_tokens": found[most] or None}
    if config["scope"] == "achieved" and most == "nothing":  # but for the text that its level was counted on
        text = calibration_windows(loaded, config["calibration"])[:COUNTED]
        columns = {"needs": "calibration", "needs_tokens": text.numel()}
    if config["scope"] == "achieved" or any(isinstance(state, Learnt) and state.tokens for _, state in fitted):
        settings = config["calibration"]
        digest = text_digest(calibration_windows(loaded, settings))
        columns["calibration"] = f"{'own' if settings['path'] else '+'.join(_names(settings['text']))} {digest[:12]}"
    return columns


def text_digest(windows: Tensor) -> str:
    """sha256 (hex) of token windows."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def _calibration(loaded: Loaded, config: CellConfig, outer: list[Any]) -> tuple[Calibration, dict[str, Any]]:
    """Calibration text as it passes through the model with the methods outside, and what identifies that."""
    facts = _facts(loaded, config, outer)
    nest = content_key(facts)
    if nest not in loaded.calibrations:  # one at a time: it holds activations
        windows = calibration_windows(loaded, config["calibration"])
        loaded.calibrations = {nest: Calibration(loaded.view, windows.split(4), bare=not outer)}
    return loaded.calibrations[nest], facts


def _facts(loaded: Loaded, config: CellConfig, outer: list[Any]) -> dict[str, Any]:
    """What identifies calibration text as it passes through the model with the methods outside."""
    view = loaded.view
    return {
        "model": view.fingerprint,
        "dtype": str(view.dtype),
        "processor": config["processor"] if config["device"] == "cuda" else "cpu",
        "tokens": text_digest(calibration_windows(loaded, config["calibration"])),
        "outer": list(outer),
    }
