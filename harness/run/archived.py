"""Which cells an archived study holds, by the ids that they have now."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.places import CHECKPOINTS
from harness.reading import read_parquet
from harness.results.kept import config_of, read_cells
from harness.run import probing
from harness.run.canonical import canonical
from harness.run.config import CellConfig
from harness.run.nest import own_target

SHAPE: dict[str, Any] = {"model": dict, "method": dict, "probe": dict, "tasks": dict}
SHAPE |= {"phase": str, "scope": str, "sparsity": (int, float), "seed": int, "batch_size": int, "dense_prefix": int}
MODEL = ("source", "repo", "revision", "name", "path")


@cache
def held(folder: str) -> frozenset[str]:
    """Ids of the cells that an archive holds. Raises `ConfigError` where there is none.

    Cells were archived with dtype and device as they were typed ("auto"). Their rows say what ran; with that they are
    recognised. Those of a model in a folder of its own are not: the archive holds neither weights nor tokenizer.
    """
    cells, table = Path(folder) / "cells.parquet", Path(folder) / "table.parquet"
    if not cells.is_file() or not table.is_file():
        raise ConfigError(f"archived names a folder without an archived study: {folder}")
    found = read_cells(Path(folder)).set_index("cell_id")["config"]
    ran = read_parquet(table, kinds=dict.fromkeys(("cell_id", "device", "dtype"), "string"))
    ran = ran.dropna().drop_duplicates("cell_id").set_index("cell_id")
    ids = set(found.index)
    for name, text in found.items():
        config = config_of(text, Path(folder))
        if "processor" not in config and name in ran.index and _ours(config):
            with suppress(ConfigError):  # it makes no sense any more: no cell of now is the same
                ids.add(_resolved(config, ran.loc[name, "device"], ran.loc[name, "dtype"]).id)
    return frozenset(ids)


def _ours(config: dict[str, Any]) -> bool:
    """Whether it is a config of this project's methods, on a model that lies in no folder. Nothing else is imported."""
    if not all(isinstance(config.get(key), kind) for key, kind in SHAPE.items()):
        return False
    model, methods, probe = config["model"], config["method"], config["probe"]
    if model.get("path") is not None or not isinstance(model.get("name"), str) or not set(MODEL) <= model.keys():
        return False
    if not isinstance(probe.get("names"), list) or not all(name in probing.names() for name in probe["names"]):
        return False
    learnt_from = config.get("calibration", "nothing is said")
    texts = [probe.get("perplexity"), *([] if learnt_from is None else [learnt_from])]
    if not all(isinstance(text, dict) and text.get("path", "") is None for text in texts):
        return False
    if not all(isinstance(probe.get(name, {}), dict) for name in probing.names()):
        return False
    if "search" in probe["names"] and not {"knob", "high"} <= probe.get("search", {}).keys():
        return False
    adapter = model.get("adapter")
    if model.get("adapter_path") is not None:
        return False
    if not isinstance(config["tasks"].get("include_path"), str | None):
        return False
    known = {record.parent.name for record in CHECKPOINTS.glob("*/adapter.json")}
    if adapter is not None and not (isinstance(adapter, str) and adapter in known):  # a stored list has no hash
        return False
    targets = [str(options.get("_target_")) for options in methods.values() if isinstance(options, dict)]
    return len(targets) == len(methods) > 0 and all(own_target(target) for target in targets)


def _resolved(config: dict[str, Any], device: str, dtype: str) -> CellConfig:
    """The cell of an old config, with what its rows say of device ("cpu: <name>", or a GPU's name) and dtype."""
    kind, _, name = device.partition(": ")
    timed = "latency" in config["probe"]["names"]
    place = {"device": "cpu", "processor": name if timed else None} if kind == "cpu" else {"device": "cuda"}
    return CellConfig(canonical(config | {"processor": device, "dtype": dtype} | place))
