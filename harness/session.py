"""What a process keeps between the cells of a sweep: the loaded model, its tokenizer, texts and calibration.

Basic Hydra sweeps run every cell in one process. A model is loaded once, calibration text is passed through it once for
what a fit asks, and a fit is made once (the store keeps it).
"""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness import assets, text
from harness.calibration import Calibration
from harness.config import CellConfig
from harness.errors import ConfigError
from harness.families import View, view_of
from harness.method import Method, State
from harness.step import Policy
from harness.store import Store, content_key


@dataclass(eq=False)
class Loaded:
    """A model ready to be measured."""

    view: View
    tokenizer: Any
    max_length: int
    calibrations: dict[str, Calibration] = field(default_factory=dict)


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name}, but no GPU is to be seen")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and on a CPU with bfloat16 matrix instructions, else float32."""
    if name == "auto":
        fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else torch.float32
    return getattr(torch, name)


def load(config: CellConfig) -> Loaded:
    """The cell's model, loaded once a process. Raises `ConfigError` where it can't be had."""
    return _load(json.dumps(config["model"], sort_keys=True), config["dtype"], config["device"])


@lru_cache(maxsize=1)
def _load(model_json: str, dtype: str, device: str) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_config = json.loads(model_json)
    place = pick_device(device)
    path = model_config["path"]
    if path is None and model_config["source"] == "embedded":
        path = assets.embedded_model_dir()
    source, revision = (str(path), None) if path else (model_config["repo"], model_config["revision"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=pick_dtype(dtype, place), attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model {model_config['name']} can't be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    model.to(place).eval().requires_grad_(False)
    fingerprint = assets.model_fingerprint(Path(path)) if path else f"{source}@{revision}"
    view = view_of(model, name=model_config["name"], fingerprint=fingerprint)
    return Loaded(view, tokenizer, int(getattr(model.config, "max_position_embeddings", 2048)))


def evaluation_windows(loaded: Loaded, perplexity: dict[str, Any], count: int) -> Tensor:
    """int64 [count, window]: held-out text in non-overlapping windows."""
    raw = Path(perplexity["path"]).read_text() if perplexity["path"] else text.evaluation_text()
    return text.token_windows(loaded.tokenizer, raw, perplexity["window"], count=count)


def calibration_windows(loaded: Loaded, calibration: dict[str, Any]) -> Tensor:
    """int64 [n, window] of calibration text; raises `ConfigError` where the text is too short."""
    raw = Path(calibration["path"]).read_text() if calibration["path"] else text.calibration_text(calibration["text"])
    window = calibration["window"]
    return text.token_windows(loaded.tokenizer, raw, window, count=calibration["tokens"] // window)


def fitted(loaded: Loaded, methods: list[Method], config: CellConfig, store: Store) -> list[tuple[Method, State]]:
    """Every nested method with its state, each fitted while the ones outside it are attached.

    A fit is identified by the model, the text, the methods outside and the method's own fit key.
    """
    view, done = loaded.view, []
    outer: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(view.tracker.tracking(Policy()))
        for method in methods:
            state: State = {}
            key_facts = {
                "model": view.fingerprint,
                "dtype": str(view.dtype),
                "data": config["calibration"],
                "outer": list(outer),
                "fit": method.fit_key(),
            }
            if method.needs != "nothing":
                nest = content_key({k: key_facts[k] for k in ("model", "dtype", "data", "outer")})
                if nest not in loaded.calibrations:
                    windows = calibration_windows(loaded, config["calibration"])
                    loaded.calibrations = {
                        nest: Calibration(view, windows.split(4))
                    }  # one at a time: it holds activations
                calibration = loaded.calibrations[nest]
                digest = hashlib.sha256(torch.cat(calibration.batches).cpu().numpy().tobytes()).hexdigest()
                key = content_key(key_facts | {"tokens": digest})
                state = store.fit(key, lambda m=method, c=calibration: m.fit(view, c))
            done.append((method, state))
            outer.append(method.fit_key() | {"sparsity": method.sparsity})
            stack.enter_context(method.attach(view, state))
    return done
