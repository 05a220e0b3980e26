"""What the trained counterparts are called, where they lie, and which command makes one. Light: no torch.

A student is a variant (`relu`) of a model, trained with a seed: `qwen2.5-coder-0.5b-relu-seed2`. Seed 0 goes unsaid,
and so does the embedded model in a checkpoint's name (`relu`), never in the name that rows have (`smollm2-135m-relu`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.data.assets import EMBEDDED_MODEL
from harness.places import CHECKPOINTS

FIGURES = "evaluation.json"  # of a checkpoint's folder: what was measured of it, which is no part of what it is
TRAINED = Path("outputs/training")  # where train.py puts its runs: TRAINED/<model>/<checkpoint>/adapter


def with_seed(name: str, seed: int | None) -> str:
    """The name of another training run of what `name` is the first run of."""
    return f"{name}-seed{seed}" if seed else name


def checkpoint_name(model: str, variant: str, seed: int) -> str:
    """The name of a run's folder and checkpoint: `relu`, `relu-seed2`, `qwen2.5-coder-0.5b-relu`."""
    return with_seed(variant if model == EMBEDDED_MODEL else f"{model}-{variant}", seed)


def called(model: Mapping[str, Any]) -> str:
    """What a model is called by which counterparts are trained: the config's name, or that of the folder given."""
    if model["name"] is None or (model["path"] is not None and model["source"] != "path"):
        return Path(model["path"]).resolve().name
    return str(model["name"])


def base_of(record: Mapping[str, Any]) -> str:
    """The model that a checkpoint's record says it was trained from; the first ones did not say it."""
    return str(record.get("model", EMBEDDED_MODEL))


def seed_of(record: Mapping[str, Any]) -> int:
    """The seed that a checkpoint's record says it was trained with; 0 where it says none."""
    recipe = record.get("recipe")
    seed = recipe.get("seed") if isinstance(recipe, Mapping) else None
    return seed if isinstance(seed, int) else 0


def model_name(record: Mapping[str, Any]) -> str:
    """What rows call the model with this checkpoint merged: base, variant and seed, whatever folder it lies in."""
    return with_seed(f"{base_of(record)}-{record.get('variant', record.get('name'))}", seed_of(record))


def find(name: str | Path) -> Path | None:
    """The folder of a checkpoint: a folder itself, one of results/checkpoints, or the run of that name in TRAINED."""
    own = sorted(TRAINED.glob(f"*/{name}/adapter")) if "/" not in str(name) else []
    return next((f for f in (Path(name), CHECKPOINTS / name, *own) if (f / "adapter.json").is_file()), None)


def known() -> list[str]:
    """The checkpoints that came with the repository and those trained here, by name."""
    shipped = {path.parent.name for path in CHECKPOINTS.glob("*/adapter.json")}
    return sorted(shipped | {path.parent.parent.name for path in TRAINED.glob("*/*/adapter/adapter.json")})


def command(model: str, variant: str, seed: int, *more: str) -> str:
    """The command line that makes this student."""
    words = [] if model == EMBEDDED_MODEL else [f"model={model}"]
    return " ".join(["python train.py", *words, f"train={variant}", *([f"train.seed={seed}"] if seed else []), *more])
