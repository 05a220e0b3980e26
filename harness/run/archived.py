"""Which cells an archived study holds, by the ids that they have now."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from harness.errors import ConfigError
from harness.run.canonical import canonical
from harness.run.config import CellConfig


@cache
def held(folder: str) -> frozenset[str]:
    """Ids of the cells that an archive holds. Raises `ConfigError` where there is none.

    Cells were archived with dtype and device as they were typed ("auto"). Their rows say what ran; with that they are
    recognised. Those of a model in a folder of its own are not: the archive holds neither weights nor tokenizer.
    """
    cells, table = Path(folder) / "cells.parquet", Path(folder) / "table.parquet"
    if not cells.is_file() or not table.is_file():
        raise ConfigError(f"archived names a folder without an archived study: {folder}")
    found = pd.read_parquet(cells, columns=["cell_id", "config"]).set_index("cell_id")["config"]
    ran = pd.read_parquet(table, columns=["cell_id", "device", "dtype"])
    ran = ran.dropna().drop_duplicates("cell_id").set_index("cell_id")
    ids = set(found.index)
    for name, text in found.items():
        config = json.loads(text)
        if "processor" not in config and name in ran.index and config["model"]["path"] is None:
            ids.add(_resolved(config, ran.loc[name, "device"], ran.loc[name, "dtype"]).id)
    return frozenset(ids)


def _resolved(config: dict[str, Any], device: str, dtype: str) -> CellConfig:
    """The cell of an old config, with what its rows say of device ("cpu: <name>", or a GPU's name) and dtype."""
    kind, _, name = device.partition(": ")
    timed = "latency" in config["probe"]["names"]
    place = {"device": "cpu", "processor": name if timed else None} if kind == "cpu" else {"device": "cuda"}
    return CellConfig(canonical(config | {"processor": device, "dtype": dtype} | place))
