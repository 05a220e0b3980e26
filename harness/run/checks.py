"""What may stand in a config. Light on purpose: bad input must end before torch is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.data import embedded, tasks
from harness.data.assets import EMBEDDED_MODEL
from harness.data.own_tasks import source_of
from harness.errors import ConfigError
from harness.model.formats import BITS, GROUPS
from harness.places import CONF, INSTALLED
from harness.run import probing
from harness.training import students
from harness.values import choice, file_or_none, listed, number, texts, whole

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's plans


def options(group: str) -> list[str]:
    """Names in a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def check_values(cfg: Mapping[str, Any]) -> None:
    """Raise `ConfigError` with one sentence for the first value that makes no sense by itself."""
    sparsity = number(cfg["sparsity"], "sparsity")
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is a share: it must be at least 0 and below 1, not {cfg['sparsity']}")
    choice(cfg["scope"], "scope", ("native", "model", "achieved"))
    choice(cfg["phase"], "phase", ("auto", "all", "decode"))
    choice(cfg["dtype"], "dtype", ("auto", "float32", "bfloat16", "float16"))
    whole(cfg["dense_prefix"], "dense_prefix", at_least=0)
    whole(cfg["batch_size"], "batch_size")
    whole(cfg["seed"], "seed", at_least=0)
    if cfg["tasks"]["limit"] is not None:
        whole(cfg["tasks"]["limit"], "tasks.limit")
    shots = cfg["tasks"]["num_fewshot"]
    for name, count in (shots if isinstance(shots, dict) else {"": 0 if shots is None else shots}).items():
        whole(count, f"tasks.num_fewshot{name and '.'}{name}", at_least=0)
    whole(cfg["tasks"]["max_gen_toks"], "tasks.max_gen_toks")
    device = str(cfg["device"])
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
    _check_model(cfg["model"])
    _check_probe(cfg["probe"])
    calibration = cfg["calibration"]
    file_or_none(calibration["path"], "calibration.path")
    names = texts(listed(calibration["text"], "calibration.text"), "calibration.text")
    if len(set(names)) < len(names):
        raise ConfigError(f"calibration.text names a text twice: {', '.join(names)}")
    whole(calibration["tokens"], "calibration.tokens")
    if calibration["seed"] is not None:
        whole(calibration["seed"], "calibration.seed", at_least=0)
    whole(calibration["window"], "calibration.window", at_least=2)
    if calibration["window"] > calibration["tokens"]:
        raise ConfigError("calibration.window is longer than calibration.tokens")
    tasks.check_tasks(texts(cfg["tasks"]["names"] or [], "tasks.names"), source_of(cfg))


def _check_model(model: Mapping[str, Any]) -> None:
    source = choice(model["source"], "model.source", ("embedded", "path", "hub", "shape"))
    for key in ("name", "path", "repo", "revision", "adapter", "adapter_path"):
        if not isinstance(model.get(key), str | None):
            raise ConfigError(f"model.{key} must be a text, not {model[key]!r}")
    if source == "hub" and model["path"] is None and not (model["name"] and model["repo"]):
        raise ConfigError("model.source=hub needs model.name and model.repo")
    _check_adapter(model)
    if model.get("weight_format") is not None:
        choice(model["weight_format"], "model.weight_format", tuple(BITS))
        if (group := model.get("weight_group", GROUPS[0])) not in GROUPS:
            raise ConfigError(f"model.weight_group must be one of {', '.join(map(str, GROUPS))}, not {group!r}")
    elif model.get("weight_group") is not None:
        raise ConfigError("model.weight_group is of quantised weights: give model.weight_format=int8 or int4 with it")
    if model.get("device_map") is not None:
        choice(model["device_map"], "model.device_map", DEVICE_MAPS)
    path = model["path"]
    if path is not None and Path(path).suffix == ".gguf" and Path(path).is_file():
        return
    if source == "embedded" and path is None:
        embedded.check(model.get("embedded", EMBEDDED_MODEL), bool(model.get("accept_license")))
    if source == "path" or path is not None:
        if path is None or not Path(path).is_dir():
            raise ConfigError(
                f"model.path names a folder that does not exist: {path}"
                if path is None or not Path(path).exists()
                else f"model.path is neither a folder in Hugging Face format nor a GGUF file: {path}"
            )
        if not (Path(path) / "config.json").is_file():
            raise ConfigError(f"model.path holds no config.json: {path}")
    elif source == "hub":
        from huggingface_hub import constants, try_to_load_from_cache

        cached = try_to_load_from_cache(model["repo"], "config.json", revision=model["revision"])
        if constants.HF_HUB_OFFLINE and not isinstance(cached, str):
            raise ConfigError(
                f"model {model['name']} lies on the hub and is not cached, but HF_HUB_OFFLINE is set: "
                f"fetch it once while online, or use model.path="
            )


def _check_adapter(model: Mapping[str, Any]) -> None:
    adapter, seed = model.get("adapter"), model.get("seed")
    if seed is not None:
        whole(seed, "model.seed", at_least=0)
        if adapter is None:
            raise ConfigError("model.seed is of a trained counterpart: give it with one, as model=smollm2-135m-relu")
    if adapter is None or students.find(model.get("adapter_path") or students.with_seed(adapter, seed)) is not None:
        return
    if INSTALLED:
        raise ConfigError(
            f"model.adapter={adapter} is no folder: the students lie in the repository (results/checkpoints), "
            "not in the installed package: run it in a checkout or name its folder"
        )
    base = model.get("embedded", EMBEDDED_MODEL)
    variant = adapter.removeprefix(f"{base}-")
    if variant not in options("train"):
        raise ConfigError(f"model.adapter={adapter} is no checkpoint: choose from {', '.join(students.known())}")
    made_by = students.command(base, variant, seed or 0)
    raise ConfigError(
        f"{students.with_seed(f'{base}-{variant}', seed)} is not trained here: `{made_by}` makes it on a GPU "
        f"(shipped: {', '.join(students.known())})"
    )


def _check_probe(probe: Mapping[str, Any]) -> None:
    for name in texts(probe["names"], "probe.names"):
        choice(name, "probe.names", probing.names())
    if not probe["names"]:
        raise ConfigError("probe.names is empty: there is nothing to measure")
    perplexity, latency = probe["perplexity"], probe["latency"]
    file_or_none(perplexity["path"], "probe.perplexity.path")
    for key, low in (("windows", 1), ("window", 4), ("kl_windows", 0)):
        whole(perplexity[key], f"probe.perplexity.{key}", low)
    whole(probe["sparsity"]["windows"], "probe.sparsity.windows")
    for key in ("batch", "context"):
        if not isinstance(latency[key], list):
            raise ConfigError(f"probe.latency.{key} must be a list, not {latency[key]!r}")
        for value in latency[key]:
            whole(value, f"probe.latency.{key}")
    whole(latency["new_tokens"], "probe.latency.new_tokens", at_least=2)
    whole(latency["repeats"], "probe.latency.repeats")
    choice(latency["execution"], "probe.latency.execution", ("auto", "masked", "kernel"))
    if not isinstance(latency["compile"], bool):
        raise ConfigError(f"probe.latency.compile must be true or false, not {latency['compile']!r}")
