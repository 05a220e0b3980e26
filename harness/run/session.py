"""What a process keeps between the cells of a sweep: the loaded model, its tokenizer, texts and calibration.

Basic Hydra sweeps run every cell in one process. A model is loaded once, calibration text is passed through it once for
what a fit asks, and a fit is made once (the store keeps it).
"""

from __future__ import annotations

import gc
import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from harness.data import assets, tasks, text
from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.fitting.scratch import Scratch
from harness.model.families import config_of, view_of
from harness.model.step import Policy
from harness.model.view import View
from harness.probes import latency
from harness.results.identity import content_key
from harness.results.store import Store
from harness.run.config import CellConfig
from harness.training.checkpoints import merge_weights, read_checkpoint, swap_activation


@dataclass(eq=False)
class Loaded:
    """A model ready to be measured."""

    view: View
    tokenizer: Any
    max_length: int
    calibrations: dict[str, Calibration] = field(default_factory=dict)


def load(config: CellConfig) -> Loaded:
    """The cell's model, loaded once a process. Raises `ConfigError` where it can't be had."""
    return _load(json.dumps(config["model"], sort_keys=True), config["dtype"], config.device)


@lru_cache(maxsize=1)
def _load(model_json: str, dtype: str, device: str) -> Loaded:
    from transformers import AutoModelForCausalLM

    gc.collect()  # hooks make a patched model part of a cycle: the one before would stay, with its activations
    model_config = json.loads(model_json)
    place, wanted = torch.device(device), getattr(torch, dtype)
    source, revision = _source(model_config)
    tokenizer = _tokenizer(model_json)
    adapter = model_config.get("adapter")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            config=config_of(source, revision),
            dtype=torch.float32 if adapter else wanted,  # an adapter is merged before anything is rounded
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _cannot_load(model_config, error) from error
    checkpoint = read_checkpoint(adapter) if adapter else None
    if checkpoint is not None:
        merge_weights(checkpoint, model)
    model.to(place, wanted).eval().requires_grad_(False)
    if checkpoint is not None:  # after the cast: its thresholds stay float32
        swap_activation(model, checkpoint.activation, checkpoint.tensors["threshold"])
    if revision:  # a branch moves: the commit that was loaded is what a fit belongs to
        fingerprint = f"{source}@{getattr(model.config, '_commit_hash', None) or revision}"
    else:
        fingerprint = assets.model_fingerprint(Path(source))
    view = view_of(model, name=model_config["name"], fingerprint=fingerprint)
    if checkpoint is not None:
        if checkpoint.record["base"] != fingerprint:
            raise ConfigError(f"checkpoint {adapter} was trained on another base than {model_config['name']}")
        view.activation = checkpoint.activation
        view.fingerprint = content_key({"base": fingerprint, "adapter": checkpoint.record["sha256"]})
    return Loaded(view, tokenizer, int(getattr(model.config, "max_position_embeddings", 2048)))


@lru_cache(maxsize=1)
def _tokenizer(model_json: str) -> Any:
    """Of its own, because whether a text is long enough must be known before a model is loaded."""
    from transformers import AutoTokenizer

    model_config = json.loads(model_json)
    source, revision = _source(model_config)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load(model_config, error) from error


def _source(model: dict[str, Any]) -> tuple[str, str | None]:
    """What transformers loads from: (folder, None) or (hub repository, revision)."""
    if model["path"] is not None:
        return str(model["path"]), None
    if model["source"] == "embedded":
        return str(assets.embedded_model_dir()), None
    return model["repo"], model["revision"]


def _cannot_load(model: dict[str, Any], error: Exception) -> ConfigError:
    return ConfigError(f"model {model['name']} can't be loaded: {' '.join(str(error).split())[:300]}")


def check_tokens(config: CellConfig) -> None:
    """Raise `ConfigError` where the tokenizer lacks what the tasks need, or a text is shorter than what is asked of it.

    Loads the tokenizer, not the model.
    """
    _check_special(config)
    tokenizer, probe = _tokenizer(json.dumps(config["model"], sort_keys=True)), config["probe"]
    asked = {
        "quality": probe["perplexity"]["windows"],
        "sparsity": probe["sparsity"]["windows"],
        "latency": latency.WINDOWS,
        "search": probe["perplexity"]["windows"],
    }
    for name in set(asked).intersection(probe["names"]):
        _evaluation_windows(tokenizer, probe["perplexity"], asked[name])
    if config["calibration"] is not None:
        _calibration_windows(tokenizer, config["calibration"])
    for name in probe["frequency"]["texts"] if "frequency" in probe["names"] else ():
        _calibration_windows(tokenizer, probe["frequency"] | {"path": None, "text": name})


def _check_special(config: CellConfig) -> None:
    """Whether texts can begin and end, and answers of a batch be padded, as lm-eval does it."""
    names = config["tasks"]["names"] or []
    if not names or not {"quality", "search"} & set(config["probe"]["names"]):
        return
    tokenizer = _tokenizer(json.dumps(config["model"], sort_keys=True))
    if tokenizer.eos_token_id is None and tokenizer.bos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {config.model_name} has no token for the beginning or the end of a text, which tasks "
            "need: name one in its tokenizer_config.json (eos_token)"
        )
    generated = [name for name in names if tasks.generates(name)]
    if not generated:
        return
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {config.model_name} has no token for the end of a text (eos_token), by which the "
            f"answers of {generated[0]} end: name one in its tokenizer_config.json"
        )
    padding = next(t for t in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) if t is not None)
    size = _vocabulary(config["model"])
    if padding >= size:
        raise ConfigError(
            f"the tokenizer of {config.model_name} pads with token {padding}, but the model knows {size} tokens only: "
            "name another pad_token in its tokenizer_config.json"
        )


def _vocabulary(model: dict[str, Any]) -> int:
    """How many tokens the model has embeddings for, as its config says."""
    from transformers import AutoConfig

    source, revision = _source(model)
    try:
        found = config_of(source, revision) or AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(model, error) from error
    return int(found.get_text_config().vocab_size)


def evaluation_windows(loaded: Loaded, perplexity: dict[str, Any], count: int) -> text.Windows:
    """Held-out text in non-overlapping windows."""
    return _evaluation_windows(loaded.tokenizer, perplexity, count)


def calibration_windows(loaded: Loaded, calibration: dict[str, Any]) -> Tensor:
    """int64 [n, window] of calibration text; raises `ConfigError` where the text is too short."""
    return _calibration_windows(loaded.tokenizer, calibration)


def _evaluation_windows(tokenizer: Any, perplexity: dict[str, Any], count: int) -> text.Windows:
    return _windows(tokenizer, perplexity["path"], None, perplexity["window"]).first(count, "perplexity")


def _calibration_windows(tokenizer: Any, calibration: dict[str, Any]) -> Tensor:
    windows = _windows(tokenizer, calibration["path"], calibration["text"], calibration["window"])
    return windows.first(calibration["tokens"] // calibration["window"], "calibration").tokens


@lru_cache(maxsize=4)
def _windows(tokenizer: Any, path: str | None, calibration: str | None, length: int) -> text.Windows:
    """All windows of a text: tokenizing a million characters takes seconds, so once a process."""
    if path:
        raw = text.own_text(path)
    else:
        raw = text.evaluation_text() if calibration is None else text.calibration_text(calibration)
    return text.text_windows(tokenizer, raw, length, what="perplexity" if calibration is None else "calibration")


def fitted(loaded: Loaded, methods: list[Method], config: CellConfig, store: Store) -> list[tuple[Method, State]]:
    """Every nested method with its state, each fitted while the ones outside it are attached.

    A fit is identified by whatever its numbers come from: the model, its dtype and the processor, the text, the
    methods outside with all of their options, and the method's own fit key.
    """
    view, done = loaded.view, []
    outer: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(view.tracker.tracking(Policy()))
        for method in methods:
            state: State = {}
            if method.needs != "nothing":
                calibration, text_facts = _calibration(loaded, config, outer)
                key = content_key(text_facts | {"fit": method.fit_key()})
                calibration.scratch = Scratch(store.root / "fits" / f"{key}.layers")
                state = store.fits.get(key, lambda m=method, c=calibration: m.fit(view, c))
                calibration.scratch.clear()
                if view.device.type == "cuda":  # there a pass is quick, and gigabytes are what other processes lack
                    calibration.forget()
            done.append((method, state))
            outer.append({"method": method.name, "version": method.version} | asdict(method))
            stack.enter_context(method.attach(view, state))
    return done


def _calibration(loaded: Loaded, config: CellConfig, outer: list[Any]) -> tuple[Calibration, dict[str, Any]]:
    """Calibration text as it passes through the model with the methods outside, and what identifies that."""
    view = loaded.view
    windows = calibration_windows(loaded, config["calibration"])
    facts = {
        "model": view.fingerprint,
        "dtype": str(view.dtype),
        "processor": config["processor"] if config["device"] == "cuda" else "cpu",
        "tokens": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "outer": list(outer),
    }
    nest = content_key(facts)
    if nest not in loaded.calibrations:  # one at a time: it holds activations
        loaded.calibrations = {nest: Calibration(view, windows.split(4))}
    return loaded.calibrations[nest], facts
