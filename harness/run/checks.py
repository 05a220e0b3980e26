"""What may stand in a config. Light on purpose: bad input must end before torch is loaded."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.data import embedded, tasks
from harness.data.assets import EMBEDDED_MODEL
from harness.data.text import CALIBRATION_TEXTS
from harness.errors import ConfigError
from harness.probes import goals as search

CONF = Path(__file__).parents[2] / "conf"
CHECKPOINTS = CONF.parent / "results" / "checkpoints"
PROBES = ("quality", "sparsity", "latency", "predictivity", "affinity", "search", "frequency")

# Probes that random weights can answer; sparsity says what a timed cell skipped.
TIMED_SHAPES = ("latency", "sparsity")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A blank and "(did you mean teal?)", or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def options(group: str) -> list[str]:
    """Names in a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def number(value: Any, key: str) -> float:
    """The value, if it is a number; else `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ConfigError(f"{key} must be a number, not {value!r}")
    return float(value)


def whole(value: Any, key: str, at_least: int = 1) -> int:
    """The value, if it is a whole number that is large enough; else `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{key} must be a whole number of at least {at_least}, not {value!r}")
    return value


def choice(value: Any, key: str, known: Sequence[str]) -> str:
    """The value, if it is a known one; else `ConfigError`."""
    if value not in known:
        raise ConfigError(f"{key} must be one of {', '.join(known)}, not {value!r}{did_you_mean(str(value), known)}")
    return value


def _file(path: Any, key: str) -> None:
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"{key} names a file that does not exist: {path}")


def check_values(cfg: Mapping[str, Any]) -> None:
    """Raise `ConfigError` with one sentence for the first value that makes no sense by itself."""
    sparsity = number(cfg["sparsity"], "sparsity")
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is a share: it must be at least 0 and below 1, not {cfg['sparsity']}")
    choice(cfg["scope"], "scope", ("native", "model"))
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
    if sentence := _only_shape(cfg["model"], cfg["probe"]["names"]):
        raise ConfigError(sentence)
    calibration = cfg["calibration"]
    _file(calibration["path"], "calibration.path")
    whole(calibration["tokens"], "calibration.tokens")
    whole(calibration["window"], "calibration.window", at_least=2)
    if calibration["window"] > calibration["tokens"]:
        raise ConfigError("calibration.window is longer than calibration.tokens")
    tasks.check_tasks(cfg["tasks"]["names"] or [])


def _check_model(model: Mapping[str, Any]) -> None:
    source = choice(model["source"], "model.source", ("embedded", "path", "hub", "shape"))
    adapter = model.get("adapter")
    if adapter is not None and not any((root / adapter / "adapter.json").is_file() for root in (CHECKPOINTS, Path())):
        known = sorted(path.parent.name for path in CHECKPOINTS.glob("*/adapter.json"))
        raise ConfigError(f"model.adapter={adapter} is no checkpoint: choose from {', '.join(known) or 'none'}")
    path = model["path"]
    if path is not None and Path(path).suffix == ".gguf" and Path(path).is_file():
        return
    if source == "embedded" and path is None:
        embedded.check(model.get("embedded", EMBEDDED_MODEL), bool(model.get("accept_license")))
    if source == "path" or path is not None:
        if path is None or not Path(path).is_dir():
            raise ConfigError(f"model.path names a folder that does not exist: {path}")
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


def _only_shape(model: Mapping[str, Any], probes: Sequence[str]) -> str | None:
    """Random weights are for latency and memory."""
    asked = [name for name in probes if name not in TIMED_SHAPES]
    if model["source"] != "shape" or not asked:
        return None
    return (
        f"{model['name']} has random weights, for latency and memory only: probe {asked[0]} would measure noise "
        "(take probe=latency)"
    )


def _check_probe(probe: Mapping[str, Any]) -> None:
    for name in probe["names"]:
        choice(name, "probe.names", PROBES)
    if not probe["names"]:
        raise ConfigError("probe.names is empty: there is nothing to measure")
    perplexity, latency = probe["perplexity"], probe["latency"]
    _file(perplexity["path"], "probe.perplexity.path")
    for key, low in (("windows", 1), ("window", 4), ("kl_windows", 0)):
        whole(perplexity[key], f"probe.perplexity.{key}", low)
    whole(probe["sparsity"]["windows"], "probe.sparsity.windows")
    for key in ("batch", "context"):
        for value in latency[key]:
            whole(value, f"probe.latency.{key}")
    whole(latency["new_tokens"], "probe.latency.new_tokens", at_least=2)
    whole(latency["repeats"], "probe.latency.repeats")
    choice(latency["execution"], "probe.latency.execution", ("auto", "masked", "kernel"))
    if not isinstance(latency["compile"], bool):
        raise ConfigError(f"probe.latency.compile must be true or false, not {latency['compile']!r}")
    if "search" in probe["names"]:
        _check_search(probe["search"])
    if "frequency" in probe["names"]:
        _check_frequency(probe["frequency"])


def _check_search(settings: Mapping[str, Any]) -> None:
    choice(settings["target"], "probe.search.target", search.TARGETS)
    choice(settings["knob"], "probe.search.knob", search.KNOBS)
    for percent in listed(settings["percent"], "probe.search.percent"):
        if number(percent, "probe.search.percent") <= 0:
            raise ConfigError(f"probe.search.percent must be above 0, not {percent}")
    for key in ("keep", "high"):
        if not 0 < number(settings[key], f"probe.search.{key}") < 1:
            raise ConfigError(f"probe.search.{key} must lie between 0 and 1, not {settings[key]}")
    if not 1e-4 <= number(settings["tolerance"], "probe.search.tolerance") < settings["high"]:
        raise ConfigError(
            f"probe.search.tolerance must be at least 0.0001 and below probe.search.high, not {settings['tolerance']}"
        )


def _check_frequency(settings: Mapping[str, Any]) -> None:
    for name in listed(settings["texts"], "probe.frequency.texts"):
        choice(name, "probe.frequency.texts", CALIBRATION_TEXTS)
    whole(settings["tokens"], "probe.frequency.tokens")
    whole(settings["window"], "probe.frequency.window", at_least=2)
    if settings["window"] > settings["tokens"]:
        raise ConfigError("probe.frequency.window is longer than probe.frequency.tokens")


def listed(value: Any, key: str) -> list[Any]:
    """A list of several, or the one in it."""
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not found:
        raise ConfigError(f"{key} is empty")
    return found
