"""From the command line to a checked cell. Light on purpose: bad input must end before torch is loaded."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data.assets import model_fingerprint
from harness.data.text import CALIBRATION_TEXTS
from harness.errors import ConfigError
from harness.probes import goals as search

if TYPE_CHECKING:
    from harness.execution.method import Method

CONF = Path(__file__).parents[2] / "conf"
CHECKPOINTS = CONF.parent / "results" / "checkpoints"
PROBES = ("quality", "sparsity", "latency", "predictivity", "affinity", "search", "frequency")
OWN_KEYS = ("search", "frequency")  # keys of probe that only the probe of that name reads: no part of other cells
# Read by the command line, not part of what is measured.
RUN_KEYS = ("results", "logger", "dry", "retry", "workers", "archived", "sweeps", "experiment", "grid")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A blank and "(did you mean teal?)", or nothing if no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def options(group: str) -> list[str]:
    """Names in a config group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@dataclass(frozen=True)
class CellConfig:
    """One checked cell: `plain` is what its id is made from; the rest is read from it."""

    plain: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.plain[key]

    @property
    def method_name(self) -> str:
        """Nested methods joined by "+", outermost first."""
        return "+".join(self.plain["method"])

    @property
    def model_name(self) -> str:
        """The model's name in tables."""
        return self.plain["model"]["name"]

    @property
    def device(self) -> str:
        """auto, cpu, cuda or cuda:N."""
        index = self.plain.get("device_index")
        return self.plain["device"] if index is None else f"{self.plain['device']}:{index}"

    def dense_twin(self) -> CellConfig:
        """The dense cell of the same model, tasks, seed, phase and texts."""
        return CellConfig(_canonical(self.plain | {"method": {"dense": {"_target_": "methods.dense.Dense"}}}))


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ConfigError(f"{key} must be a number, not {value!r}")
    return float(value)


def whole(value: Any, key: str, at_least: int = 1) -> int:
    """The value, if it is a whole number that is large enough; else `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{key} must be a whole number of at least {at_least}, not {value!r}")
    return value


def _choice(value: Any, key: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ConfigError(f"{key} must be one of {', '.join(known)}, not {value!r}{did_you_mean(str(value), known)}")
    return value


def _file(path: Any, key: str) -> None:
    if path is not None and not Path(path).is_file():
        raise ConfigError(f"{key} names a file that does not exist: {path}")


def check(plain: Mapping[str, Any]) -> CellConfig:
    """Check one composed config (plain types). Raises `ConfigError` with one sentence."""
    cfg = {key: value for key, value in plain.items() if key not in RUN_KEYS}
    sparsity = _number(cfg["sparsity"], "sparsity")
    if not 0 <= sparsity < 1:
        raise ConfigError(f"sparsity is a share: it must be at least 0 and below 1, not {cfg['sparsity']}")
    _choice(cfg["scope"], "scope", ("native", "model"))
    _choice(cfg["phase"], "phase", ("auto", "all", "decode"))
    _choice(cfg["dtype"], "dtype", ("auto", "float32", "bfloat16", "float16"))
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
    if device not in ("auto", "cpu", "cuda") and not device.removeprefix("cuda:").isdigit():
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
    _check_model(cfg["model"])
    _check_probe(cfg["probe"])
    calibration = cfg["calibration"]
    _file(calibration["path"], "calibration.path")
    whole(calibration["tokens"], "calibration.tokens")
    whole(calibration["window"], "calibration.window", at_least=2)
    if calibration["window"] > calibration["tokens"]:
        raise ConfigError("calibration.window is longer than calibration.tokens")
    from harness.data import tasks

    names = cfg["tasks"]["names"] or []
    tasks.check_tasks(names)
    _check_probes_of(build_methods(cfg["method"]), cfg)
    return CellConfig(_canonical(cfg))


def _check_model(model: Mapping[str, Any]) -> None:
    source = _choice(model["source"], "model.source", ("embedded", "path", "hub"))
    adapter = model.get("adapter")
    if adapter is not None and not any((root / adapter / "adapter.json").is_file() for root in (CHECKPOINTS, Path())):
        known = sorted(path.parent.name for path in CHECKPOINTS.glob("*/adapter.json"))
        raise ConfigError(f"model.adapter={adapter} is no checkpoint: choose from {', '.join(known) or 'none'}")
    if source == "path" or model["path"] is not None:
        path = model["path"]
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


def _check_probe(probe: Mapping[str, Any]) -> None:
    for name in probe["names"]:
        _choice(name, "probe.names", PROBES)
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
    _choice(latency["execution"], "probe.latency.execution", ("auto", "masked", "kernel"))
    if not isinstance(latency["compile"], bool):
        raise ConfigError(f"probe.latency.compile must be true or false, not {latency['compile']!r}")
    if "search" in probe["names"]:
        _check_search(probe["search"])
    if "frequency" in probe["names"]:
        _check_frequency(probe["frequency"])


def _check_search(settings: Mapping[str, Any]) -> None:
    _choice(settings["target"], "probe.search.target", search.TARGETS)
    _choice(settings["knob"], "probe.search.knob", search.KNOBS)
    for percent in _listed(settings["percent"], "probe.search.percent"):
        if _number(percent, "probe.search.percent") <= 0:
            raise ConfigError(f"probe.search.percent must be above 0, not {percent}")
    for key in ("keep", "high"):
        if not 0 < _number(settings[key], f"probe.search.{key}") < 1:
            raise ConfigError(f"probe.search.{key} must lie between 0 and 1, not {settings[key]}")
    if not 1e-4 <= _number(settings["tolerance"], "probe.search.tolerance") < settings["high"]:
        raise ConfigError(
            f"probe.search.tolerance must be at least 0.0001 and below probe.search.high, not {settings['tolerance']}"
        )


def _check_frequency(settings: Mapping[str, Any]) -> None:
    for name in _listed(settings["texts"], "probe.frequency.texts"):
        _choice(name, "probe.frequency.texts", CALIBRATION_TEXTS)
    whole(settings["tokens"], "probe.frequency.tokens")
    whole(settings["window"], "probe.frequency.window", at_least=2)
    if settings["window"] > settings["tokens"]:
        raise ConfigError("probe.frequency.window is longer than probe.frequency.tokens")


def _check_probes_of(methods: Sequence[Method], cfg: Mapping[str, Any]) -> None:
    """Whether the probes mean something for these methods."""
    names = cfg["probe"]["names"]
    if "search" in names:
        search.check(cfg["probe"]["search"], cfg["scope"], methods)
    if "frequency" in names and not any(method.makes_experts for method in methods):
        raise ConfigError(f"probe frequency counts the use of experts, and {methods[-1].name} makes none")


def _listed(value: Any, key: str) -> list[Any]:
    """A list of several, or the one in it."""
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not found:
        raise ConfigError(f"{key} is empty")
    return found


def build_methods(config: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Build the nested methods, outermost first. Raises `ConfigError` for an option that a method does not have."""
    methods = []
    for name, options_ in config.items():
        module, _, cls = str(options_["_target_"]).rpartition(".")
        factory = getattr(importlib.import_module(module), cls)
        known = [field.name for field in fields(factory)]
        given = {key: value for key, value in options_.items() if key != "_target_"}
        for key in given:
            if key not in known:
                raise ConfigError(f"method {name} has no option {key!r}{did_you_mean(key, known)}")
        try:
            methods.append(factory(**given))
        except TypeError as error:
            raise ConfigError(f"method {name}: {error}") from error
    # In a nest the requested sparsity is for the innermost method; a swap outside of it keeps its natural zeros.
    return [replace(m, sparsity=0.0) if m.swap and m is not methods[-1] else m for m in methods]


def _canonical(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts written one way, so that two spellings of one cell share its id."""
    cfg = dict(cfg)
    methods = build_methods(cfg["method"])
    cfg["sparsity"] = float(cfg["sparsity"])
    if cfg["phase"] == "auto":
        allowed = set(methods[0].phases).intersection(*(m.phases for m in methods))
        cfg["phase"] = next((p for p in methods[0].phases if p in allowed), methods[0].phases[0])
    if list(cfg["method"]) == ["dense"]:
        cfg |= {"sparsity": 0.0, "scope": "native", "dense_prefix": 0}
        cfg["method"] = {"dense": {"_target_": "methods.dense.Dense", "sparsity": 0.0}}
        methods = []
    if all(m.needs == "nothing" for m in methods):
        cfg["calibration"] = None
    device, _, index = str(cfg["device"]).partition(":")
    if index:  # which of equal GPUs makes no difference
        cfg |= {"device": device, "device_index": int(index)}
    # A path does not say what lies there: another text, or other weights, make another cell.
    if cfg["model"]["path"] is not None:
        cfg["model"] = cfg["model"] | {"fingerprint": model_fingerprint(cfg["model"]["path"])}
    if cfg["model"].get("adapter"):  # its shards' hashes are in the record
        record = CHECKPOINTS / cfg["model"]["adapter"] / "adapter.json"
        record = record if record.is_file() else Path(cfg["model"]["adapter"]) / "adapter.json"
        cfg["model"] = cfg["model"] | {"fingerprint": hashlib.sha256(record.read_bytes()).hexdigest()}
    if cfg["calibration"] is not None:
        cfg["calibration"] = _with_hash(cfg["calibration"])
    cfg["probe"] = _canonical_probe(cfg["probe"]) | {"perplexity": _with_hash(cfg["probe"]["perplexity"])}
    if cfg["probe"]["names"] == ["search"] and methods:  # of nothing else: its cell is that of the highest level
        knob, high = cfg["probe"]["search"]["knob"], cfg["probe"]["search"]["high"]
        cfg["sparsity"] = high if knob == "sparsity" else 0.0
        at = {name: options | {"sparsity": cfg["sparsity"]} for name, options in cfg["method"].items()}
        inner = list(at)[-1]
        cfg["method"] = at | {inner: at[inner] | {knob: high}}
    return cfg


def _canonical_probe(probe: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys of probes that are not run, or that their target does not read."""
    found = {key: value for key, value in probe.items() if key not in OWN_KEYS or key in probe["names"]}
    if "search" in found:
        unread = "keep" if found["search"]["target"] == "ppl_increase" else "percent"
        found["search"] = {key: value for key, value in found["search"].items() if key != unread}
        if "percent" in found["search"]:
            found["search"]["percent"] = [float(p) for p in _listed(found["search"]["percent"], "percent")]
    if "frequency" in found:
        found["frequency"] = found["frequency"] | {"texts": _listed(found["frequency"]["texts"], "texts")}
    return found


def _with_hash(text: Mapping[str, Any]) -> dict[str, Any]:
    """A text's config with the hash of the user's own file, if it is one."""
    if text["path"] is None:
        return dict(text)
    return dict(text) | {"sha256": hashlib.sha256(Path(text["path"]).read_bytes()).hexdigest()}
