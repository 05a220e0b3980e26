"""Task scores of the students beside the base, from finished cells into figures and cards.

`python -m harness.training.scores results` reads dense cells of each shipped student and of its base (of lte its `lte`
cell), pairs them by item, and writes results/checkpoints/NAME/{evaluation.json,README.md} anew.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from harness.console import say, stdout
from harness.errors import ConfigError
from harness.places import CHECKPOINTS
from harness.results.collect import read_rows
from harness.results.samples import read_samples
from harness.results.stats import standard_error
from harness.results.store import Store
from harness.training.card import read_whole, write_figures
from harness.training.students import base_of, model_name


def scores(root: Path, base: str, student: str) -> dict[str, Any]:
    """By task: items, accuracy of base and student, paired difference and its standard error; device and dtype.

    Only whole runs count (1,000 items, or all of a smaller task). Raises `ConfigError` where a cell is missing.
    """
    rows, _ = read_rows(Store(root))
    rows = rows[(rows["probe"] == "quality") & (rows["limited"] != True)]  # noqa: E712 (a nullable column)
    samples = read_samples(root)
    samples = samples[samples["kind"] == "accuracy"]
    both = {}
    for model, method in ((base, "dense"), (student, "lte" if student.endswith("-lte") else "dense")):
        cells = rows[(rows["model"] == model) & (rows["method"] == method)]
        own = samples[samples["cell_id"].isin(cells["cell_id"]) & samples["task"].isin(cells["task"])]
        if own.empty:
            raise ConfigError(f"{root} has no whole {method} cell of {model} with tasks")
        both[model] = own.drop_duplicates(["task", "item"]).set_index(["task", "item"])["value"].astype(float)
        place = cells.iloc[0]
    paired = pd.concat(both, axis=1, join="inner")
    found = {}
    for task, values in paired.groupby(level="task", observed=True):
        gap = (values[student] - values[base]).to_numpy()
        found[str(task)] = {
            "items": len(values),
            "base": float(values[base].mean()),
            "score": float(values[student].mean()),
            "difference": float(gap.mean()),
            "stderr": float(standard_error(gap)),
        }
    return {"device": str(place["device"]), "dtype": str(place["dtype"]), "scores": found}


def main(root: Path) -> None:
    """Write the scores of every student that has cells."""
    for folder in sorted(path.parent for path in CHECKPOINTS.glob("*/adapter.json")):
        record = read_whole(folder)
        try:
            found = scores(root, base_of(record), model_name(record))
        except ConfigError as error:
            say(stdout(), f"{folder.name}: {error}")
            continue
        write_figures(folder, record["evaluation"] | {"tasks": found})
        told = (f"{k} {v['difference']:+.3f} ± {v['stderr']:.3f}" for k, v in found["scores"].items())
        say(stdout(), f"{folder.name}: {', '.join(told)}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
