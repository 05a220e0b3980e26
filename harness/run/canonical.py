"""The facts of a cell written one way: whatever can change its numbers, resolved, and nothing else.

Two spellings of one cell come out equal, so they share its id; what is left to the machine (auto) or to a file (a path)
is replaced by what it comes to.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data.assets import model_fingerprint
from harness.data.own_tasks import digest
from harness.errors import ConfigError, DamagedError
from harness.model.formats import BITS, GROUPS, Format
from harness.places import CHECKPOINTS
from harness.reading import read_json
from harness.run import machine, probing
from harness.run.nest import build_methods, keeps_natural, phase_of, reads_level
from harness.training import students

if TYPE_CHECKING:
    from harness.execution.method import Method

DENSE = {"dense": {"_target_": "methods.dense.Dense", "sparsity": 0.0}}
# Of a model's folder: what turns text into tokens, and what shapes generated answers.
TEXT_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)
AUTHORSHIP = ("transformers_version", "_name_or_path", "name_or_path", "_from_model_config")  # no part of a model


def canonical(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts written one way. Canonical facts come out as they are."""
    cfg = dict(cfg)
    methods = build_methods(cfg["method"])
    if cfg["phase"] == "auto":
        cfg["phase"] = phase_of(methods)
    if list(cfg["method"]) == ["dense"]:
        cfg |= {"sparsity": 0.0, "scope": "native", "dense_prefix": 0, "method": DENSE}
        methods = []
    else:
        cfg |= _requested(cfg, methods)
    if all(m.needs == "nothing" for m in methods) and cfg["scope"] != "achieved":  # whose level is counted on it
        cfg["calibration"] = None
    if "processor" not in cfg:
        device, index = machine.pick_device(str(cfg["device"]))
        cfg |= {"device": device, "dtype": machine.pick_dtype(cfg["dtype"], device)}
        cfg["processor"] = machine.processor(device, index, probing.timed(cfg["probe"]))
    cfg["model"] = _model(cfg["model"])
    cfg["tasks"] = _tasks(cfg["tasks"])
    if cfg["calibration"] is not None:
        drawn = cfg["calibration"].get("seed") is not None
        learnt_from = {k: v for k, v in cfg["calibration"].items() if drawn or k != "seed"}
        if isinstance(learnt_from["text"], list) and len(learnt_from["text"]) == 1:
            [learnt_from["text"]] = learnt_from["text"]
        cfg["calibration"] = _with_hash(learnt_from)
    cfg["probe"] = probing.canonical(cfg["probe"]) | {"perplexity": _with_hash(cfg["probe"]["perplexity"])}
    return cfg


def _requested(cfg: Mapping[str, Any], methods: Sequence[Method]) -> dict[str, Any]:
    """sparsity and method: without numbers that nothing reads."""
    sparsity = None if cfg["sparsity"] is None else float(cfg["sparsity"])
    searching = cfg["probe"]["names"] == ["search"]  # and nothing else: the cell of all levels up to the highest
    if searching or not reads_level(methods):
        sparsity = None
    level, knob = sparsity, None
    if searching:
        knob, high = cfg["probe"]["search"]["knob"], cfg["probe"]["search"]["high"]
        level = high if knob == "sparsity" else 0.0
    nest = {}
    for (name, options), method in zip(cfg["method"].items(), methods, strict=True):
        nest[name] = options | {"sparsity": 0.0 if keeps_natural(method, methods) else level}
    if knob is not None:
        inner = list(nest)[-1]
        nest[inner] = nest[inner] | {knob: high}
    return {"sparsity": sparsity, "method": nest}


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    """A path does not say what lies there: another tokenizer, or other weights, make another cell."""
    model = dict(model)
    if model["path"] is not None:
        folder = Path(model["path"])
        model["fingerprint"] = model_fingerprint(folder)
        if folder.is_dir():  # a GGUF file has its tokenizer inside
            model["text"] = text_fingerprint(folder)
        if model["name"] is None:
            model["name"] = os.fsencode(folder.resolve().name.removesuffix(".gguf")).decode("utf-8", "replace")
    model.pop("accept_license", None)  # of one who may not have it there is no cell
    if model.get("adapter"):
        model |= _student(model)
    model.pop("seed", None)
    model |= _format(model)
    if model["path"] is None and model["source"] == "hub":
        model["revision"] = _commit(model)
    return model


def _student(model: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter and what rows call the model: its record says which variant and seed it is, not who asked for it."""
    name = students.with_seed(model["adapter"], model.get("seed"))
    folder = students.find(model.get("adapter_path") or name)
    if folder is None:
        raise ConfigError(f"model.adapter={name} is no checkpoint: choose from {', '.join(students.known())}")
    content = (folder / "adapter.json").read_bytes()  # its shards' hashes are in it
    record = read_json(folder / "adapter.json")
    if not isinstance(record.get("name"), str):
        raise DamagedError(f"{folder / 'adapter.json'} can't be read: it lacks name")
    facts = {"name": students.model_name(record), "adapter": record["name"]}
    if folder.parent != CHECKPOINTS:
        facts["adapter_path"] = str(folder)
    return facts | {"fingerprint": hashlib.sha256(content).hexdigest()}


def _tasks(tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Where own tasks lie makes no difference, what lies there does."""
    tasks = dict(tasks)
    if tasks.get("include_path") is None:
        tasks.pop("include_path", None)
        return tasks
    return tasks | {"sha256": digest(tasks["include_path"])}


def _format(model: dict[str, Any]) -> dict[str, Any]:
    """A quantised model goes by another name, so that nothing sets it beside the plain one as if it were the same."""
    for key in ("weight_format", "weight_group", "device_map"):
        if key in model and model[key] is None:
            del model[key]
    if "weight_format" not in model:
        return {}
    group = model.get("weight_group", GROUPS[0])
    name = Format(BITS[model["weight_format"]], group).name
    plain = model["name"].removesuffix(f"-{name}")
    return {"weight_group": group, "name": f"{plain}-{name}"}


def text_fingerprint(folder: Path) -> str:
    """sha256 (hex) over the `TEXT_FILES` of a Hugging Face model folder, names and contents."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in TEXT_FILES for path in folder.glob(pattern) if path.is_file()}):
        content = path.read_bytes()
        if path.suffix == ".json":
            content = _facts(content)
        digest.update(f"{path.name} {hashlib.sha256(content).hexdigest()} ".encode())
    return digest.hexdigest()


def _facts(content: bytes) -> bytes:
    """JSON without who wrote it, and however it is laid out."""
    try:
        facts = json.loads(content)
    except ValueError:
        return content
    if isinstance(facts, dict):
        facts = {key: value for key, value in facts.items() if key not in AUTHORSHIP}
    return json.dumps(facts, sort_keys=True).encode()


def _commit(model: Mapping[str, Any]) -> str:
    """A branch or a tag moves: the commit that it names now, as the cache has it, else the hub."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    repo, revision = model["repo"], model["revision"] or "main"
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    cached = try_to_load_from_cache(repo, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent.name
    try:
        return str(HfApi().model_info(repo, revision=revision).sha)
    except Exception as error:  # the network's, the hub's or the user's
        raise ConfigError(f"the commit of {repo} at revision {revision} can't be found: {error}") from error


def _with_hash(text: Mapping[str, Any]) -> dict[str, Any]:
    """A text's config with the hash of the user's own file, if it is one, as it is read: less a byte order mark."""
    if text["path"] is None:
        return dict(text)
    content = Path(text["path"]).read_bytes().removeprefix(codecs.BOM_UTF8)
    return dict(text) | {"sha256": hashlib.sha256(content).hexdigest()}
