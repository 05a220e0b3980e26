"""Load a cell's model, once a process: from a folder, a GGUF file, the embedded ones or the hub."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from harness.data import embedded
from harness.data.assets import EMBEDDED_MODEL, model_fingerprint
from harness.data.gguf import read
from harness.errors import ConfigError
from harness.fitting.calibration import Calibration
from harness.model import memory, shapes, sharding
from harness.model.families import config_of, view_of
from harness.model.formats import BITS, Format
from harness.model.quantise import quantise
from harness.model.view import View
from harness.results.identity import content_key
from harness.run.config import CellConfig
from harness.training.checkpoints import merge_weights, read_checkpoint, swap_activation

UNQUANTISED = ("F64", "F32", "F16", "BF16")
WINDOW = 512  # tokens of the pass that memory is estimated for


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


def tokenizer_of(config: CellConfig) -> Any:
    """The cell's tokenizer, without the model."""
    return _tokenizer(config.model_name, *_source(config["model"]))


@lru_cache(maxsize=1)
def _load(model_json: str, dtype: str, device: str) -> Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM

    gc.collect()  # hooks make a patched model part of a cycle: the one before would stay, with its activations
    model_config = json.loads(model_json)
    place, wanted = torch.device(device), getattr(torch, dtype)
    source, revision = _source(model_config)
    tokenizer = _tokenizer(model_config["name"], source, revision)
    adapter = model_config.get("adapter")
    spread = sharding.device_map(model_config, place)
    if model_config["source"] == "shape":
        view = view_of(shapes.random_model(model_config, wanted, place), model_config["name"], shapes.key(model_config))
        _quantise(view, model_config)
        return Loaded(view, tokenizer, int(view.model.config.max_position_embeddings))
    try:
        config = config_of(source, revision) or AutoConfig.from_pretrained(source, revision=revision)
        memory.check(model_config["name"], memory.need(config, wanted, WINDOW), place, spread=bool(spread))
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            config=config,
            dtype=torch.float32 if adapter else wanted,  # an adapter is merged before anything is rounded
            attn_implementation=_attention(source, revision),
            trust_remote_code=False,
            device_map=spread,
            use_safetensors=True if revision is None else None,  # of the hub, pinned by its commit, some have no others
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _cannot_load(model_config, error) from error
    checkpoint = read_checkpoint(model_config.get("adapter_path") or adapter) if adapter else None
    if checkpoint is not None:
        merge_weights(checkpoint, model)
    if spread is None:
        model.to(place, wanted)
    elif sharding.left_out(model):
        raise ConfigError(f"model {model_config['name']} does not fit the GPUs: parts of it would lie outside")
    model.eval().requires_grad_(False)
    if checkpoint is not None:  # after the cast: its thresholds stay float32
        swap_activation(model, checkpoint.activation, checkpoint.tensors["threshold"])
    if revision:  # a branch moves: the commit that was loaded is what a fit belongs to
        fingerprint = f"{source}@{getattr(model.config, '_commit_hash', None) or revision}"
    else:
        fingerprint = model_fingerprint(Path(source))
    view = sharding.with_limits(view_of(model, name=model_config["name"], fingerprint=fingerprint))
    if checkpoint is not None:
        if checkpoint.record["base"] != fingerprint:
            raise ConfigError(f"checkpoint {adapter} was trained on another base than {model_config['name']}")
        view.activation = checkpoint.activation
        view.fingerprint = content_key({"base": fingerprint, "adapter": checkpoint.record["sha256"]})
    else:
        view.source = _made_of(model_config)
    _quantise(view, model_config)
    return Loaded(view, tokenizer, int(getattr(model.config, "max_position_embeddings", 2048)))


def _quantise(view: View, model: dict[str, Any]) -> None:
    """Give the weights the format that was asked for, if any."""
    if model.get("weight_format") is not None:
        stored = Format(BITS[model["weight_format"]], model["weight_group"])
        quantise(view, stored)
        view.fingerprint = content_key({"base": view.fingerprint, "weight_format": stored.name})


def _made_of(model: dict[str, Any]) -> str | None:
    """The type of the GGUF file that plain weights were made from, None where they are the original's."""
    if model["path"] is not None:
        path = Path(model["path"])
        kind = read(path)["kind"] if path.suffix == ".gguf" else None
        return None if kind in UNQUANTISED else kind
    return embedded.kind_of(model.get("embedded", EMBEDDED_MODEL)) if model["source"] == "embedded" else None


def _tokenizer(name: str, source: str, revision: str | None) -> Any:
    """Of its own, because whether a text is long enough must be known before a model is loaded."""
    try:
        return _loaded_tokenizer(source, revision)
    except (OSError, ValueError) as error:
        raise _cannot_load({"name": name}, error) from error


@lru_cache(maxsize=16)
def _loaded_tokenizer(source: str, revision: str | None) -> Any:
    """Once a source: checkpoints of one base share it, and with it the texts that it has cut into tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)


def _source(model: dict[str, Any]) -> tuple[str, str | None]:
    """What transformers loads from: (folder, None) or (hub repository, revision)."""
    if model["path"] is not None:
        path = Path(model["path"])
        return str(embedded.gguf_dir(path) if path.suffix == ".gguf" else path), None
    if model["source"] == "shape":  # random weights read any text: the smallest tokenizer there is
        return str(embedded.embedded_dir(EMBEDDED_MODEL)), None
    if model["source"] == "embedded":
        return str(embedded.embedded_dir(model.get("embedded", EMBEDDED_MODEL))), None
    return model["repo"], model["revision"]


def _attention(source: str, revision: str | None) -> str:
    """torch's attention, or the written-out one where scores are capped softly (Gemma 2), which torch's can't."""
    from transformers import PreTrainedConfig

    found, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    capped = found.get("model_type") == "gemma2" and found.get("attn_logit_softcapping", 50.0) is not None
    return "eager" if capped else "sdpa"


def _cannot_load(model: dict[str, Any], error: Exception) -> ConfigError:
    return ConfigError(f"model {model['name']} can't be loaded: {' '.join(str(error).split())[:300]}")


def vocabulary(config: CellConfig) -> int | None:
    """How many tokens the model has embeddings for, where its config says so. No code of a model is loaded."""
    from transformers import PreTrainedConfig

    model = config["model"]
    source, revision = _source(model)
    try:
        facts, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(model, error) from error
    return facts.get("text_config", facts).get("vocab_size")
