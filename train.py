"""The second app, `python train.py train=relu`: train the counterparts of a model (conf/training.yaml)."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import hydra
import psutil
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file

from harness.console import complain, say, stdout
from harness.errors import AssetError, ConfigError
from harness.files import write_atomic
from harness.places import CONF
from harness.progress import counting
from harness.training import budget
from harness.training.adapter import cut, merge
from harness.training.card import write_figures
from harness.training.checkpoints import read_checkpoint, save_checkpoint
from harness.training.data import Batches, pieces_of, prepare, read_pieces, read_tokens
from harness.training.evaluate import evaluate
from harness.training.experts import cached_cluster
from harness.training.llama import Model
from harness.training.loop import Recipe, Trainer, read_state
from harness.training.students import base_of, called, checkpoint_name, command, find
from harness.training.text import write_text

UNFINISHED = 3  # exit code of a run that `stop_after_s` ended: the same command goes on


def main() -> None:
    """Compose the configuration, run the stages, end with 2 and one sentence on a user's error."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra prints every error itself and ends with 1
    try:
        app()
    except (ConfigError, AssetError, HydraException, OmegaConfBaseException) as error:
        complain(error)
        sys.exit(2)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="training")
def app(cfg: DictConfig) -> None:
    """Run the stages of `cfg.do` for one variant."""
    recipe = cast(Recipe, OmegaConf.to_object(cfg.train))
    unknown = set(cfg.do) - {"text", "train", "evaluate"}
    if unknown:
        raise ConfigError(f"do={sorted(unknown)}: the stages are text, train and evaluate")
    device = _device(str(cfg.device))
    model_dir = _model_dir(cfg)
    cfg.model.name = called(cfg.model)
    name = checkpoint_name(cfg.model.name, recipe.name, recipe.seed)
    deadline = None
    if cfg.stop_after_s is not None:
        deadline = time.monotonic() + float(cfg.stop_after_s) - (time.time() - psutil.Process().create_time())
    text = Path(cfg.folder) / "text"
    prepare(model_dir, text, cfg.text.separator)
    if not cfg.do:  # all that needs a network is here now
        return
    model = read_model(model_dir)
    pieces = pieces_of(recipe.seed, cfg.text.pieces)
    if "text" in cfg.do:
        _fits(device, budget.writing_bytes(model.shape, cfg.text.batch, cfg.text.length), "text.batch")
        mine = pieces if cfg.text.piece is None else pieces[cfg.text.piece : cfg.text.piece + 1]
        if not write_text(cfg.text, mine, model, text, device, deadline):
            sys.exit(UNFINISHED)
    if "train" in cfg.do and not train(cfg, recipe, name, model, text, device, deadline):
        sys.exit(UNFINISHED)
    if "evaluate" in cfg.do:
        if deadline is not None and time.monotonic() > deadline:
            say(stdout(), f"{name}: no time is left to evaluate it: the same command goes on")
            sys.exit(UNFINISHED)
        score(cfg, recipe, name, model, text, device)


def _device(asked: str) -> torch.device:
    device = torch.device(asked if asked != "auto" else ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # where Triton launches
        torch.set_float32_matmul_precision("high")
    else:
        torch.use_deterministic_algorithms(True)
    return device


def _fits(device: torch.device, need: int, key: str) -> None:
    """ConfigError where a GPU has less memory than the stage needs."""
    if device.type == "cuda" and need > (there := torch.cuda.get_device_properties(device).total_memory):
        raise ConfigError(f"this needs about {need / 2**30:.0f} GiB, the GPU has {there / 2**30:.0f}: lower {key}")


def _model_dir(cfg: DictConfig) -> Path:
    from harness.data.assets import EMBEDDED_MODEL
    from harness.data.embedded import embedded_dir

    if cfg.model.path is None and cfg.model.source == "embedded":
        return embedded_dir(cfg.model.get("embedded", EMBEDDED_MODEL))
    if cfg.model.path is None or not (Path(cfg.model.path) / "config.json").exists():
        raise ConfigError(f"model.path={cfg.model.path} holds no config.json: a local folder is what can be trained")
    return Path(cfg.model.path)


def read_model(folder: Path) -> Model:
    """The frozen weights of a Hugging Face folder of LLaMA or Qwen2, fp32. ConfigError where it is none."""
    config = json.loads((folder / "config.json").read_text())
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return Model.of(config, state)


# ------------------------------------------------------------------------------------------------- stages


def train(
    cfg: DictConfig, recipe: Recipe, name: str, model: Model, text: Path, device: torch.device, deadline: float | None
) -> bool:
    """Distil one variant, resuming FOLDER/NAME if it has a state, and write its adapter. Returns whether it is done."""
    folder = Path(cfg.folder) / name
    if cfg.stop_at is None and (folder / "adapter" / "adapter.json").exists():
        say(stdout(), f"{name}: trained before, in {folder / 'adapter'}")
        return True
    own, _ = read_pieces(text, pieces_of(recipe.seed, cfg.text.pieces))
    (real,) = read_tokens(text, "real.safetensors")
    batches = Batches(own.to(device), real.to(device), recipe.real_share, recipe.batch, recipe.length, recipe.seed)
    experts = None
    if recipe.expert_size:
        layers = model.shape.layers
        with counting(layers, "clustering neurons") as advance:
            path = text.parent / f"experts-{recipe.expert_size}.safetensors"
            experts = cached_cluster(model, recipe.expert_size, recipe.seed, path, advance)
    origin = read_checkpoint(_origin(cfg, recipe)) if recipe.init_from else None
    need = budget.training_bytes(model.shape, recipe.rank, recipe.batch * recipe.length)
    size = budget.shipped_bytes(model.shape, recipe.ship_rank or recipe.rank)
    say(stdout(), f"{name}: at most {need / 2**30:.0f} GiB on a GPU; the adapter will have {size / 2**20:.1f} MiB")
    _fits(device, need, "train.batch")
    init = origin.tensors if origin else None
    trainer = Trainer(recipe, model, batches, device, init, experts)
    if trainer.load(folder):
        say(stdout(), f"{name}: going on from step {trainer.step:,}")
    speeds: list[dict[str, float]] = []
    started = time.perf_counter()
    bar = counting(recipe.steps, f"training {name}", trainer.step, stays=True)
    with bar as advance, tracker(cfg, recipe, name) as track:

        def report(entry: dict[str, float]) -> None:
            speeds.append(entry)
            advance.at(int(entry["step"]))
            track(entry)

        trainer.run(folder, cfg.log_every, cfg.save_every_s, report, cfg.stop_at, deadline)
    if trainer.step < recipe.steps:
        say(stdout(), f"{name}: stopped at step {trainer.step:,} of {recipe.steps:,}: the same command goes on")
        return False
    steady = speeds[len(speeds) // 2 :] or [{"tokens_per_second": 0.0}]
    run = {
        "steps": trainer.step,
        "tokens": trainer.step * recipe.batch * recipe.length,
        "passes": trainer.step * recipe.batch * recipe.length * (1 - recipe.real_share) / len(own),
        "own_tokens": len(own),
        "real_tokens": len(real),
        "seconds": time.perf_counter() - started,  # of this sitting, compilation included
        "tokens_per_second": sorted(e["tokens_per_second"] for e in steady)[len(steady) // 2],
        "mfu": sorted(e.get("mfu", 0.0) for e in steady)[len(steady) // 2],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    from harness.data.assets import model_fingerprint

    record = {
        "name": name,
        "model": cfg.model.name,
        "variant": recipe.name,
        "activation": recipe.activation,
        "factor": recipe.factor,
        "threshold": float(trainer.threshold),
        "experts": recipe.expert_size,
        "base": model_fingerprint(_model_dir(cfg)),
        "recipe": asdict(recipe) | {"init_from": origin.name if origin else None},
        "run": run,
        "history": trainer.history,
    }
    save_checkpoint(folder / "adapter", cut(trainer.adapter_tensors(), recipe.ship_rank), record)
    return True


def _origin(cfg: DictConfig, recipe: Recipe) -> Path:
    """The folder of the adapter to go on from: a folder, or the run of that variant, of the same model and seed."""
    assert recipe.init_from is not None
    name = checkpoint_name(cfg.model.name, recipe.init_from, recipe.seed)
    folder = Path(cfg.folder) / name / "adapter"
    wanted = recipe.init_from if "/" in recipe.init_from else name  # of another seed only where a folder says so
    found = folder if "/" not in recipe.init_from and (folder / "adapter.json").is_file() else find(wanted)
    if found is None or base_of(read_checkpoint(found).record) != cfg.model.name:
        made_by = command(cfg.model.name, recipe.init_from, recipe.seed)
        raise ConfigError(f"train.init_from={recipe.init_from}: there is no {name} to go on from; `{made_by}` makes it")
    return found


def score(cfg: DictConfig, recipe: Recipe, name: str, model: Model, text: Path, device: torch.device) -> None:
    """Evaluate FOLDER/NAME/adapter as shipped, next to the base, and write its model card."""
    folder = Path(cfg.folder) / name
    checkpoint = read_checkpoint(folder / "adapter")
    (windows,) = read_tokens(text, "windows.safetensors")
    windows = windows[: cfg.evaluate.windows]
    _, heldout = read_pieces(text, pieces_of(recipe.seed, cfg.text.pieces))
    own = heldout[: len(heldout) // windows.shape[1] * windows.shape[1]].view(-1, windows.shape[1])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    teacher = model.to(device, dtype)
    drops = [float(d) for d in cfg.evaluate.drops]

    def measure(
        tensors: dict[str, torch.Tensor] | None, activation: str, tokens: torch.Tensor, drop: float = 0.0
    ) -> dict[str, Any]:
        student, thresholds, experts = teacher, torch.zeros(model.shape.layers, device=device), None
        if tensors is not None:
            student = merged(model, tensors, checkpoint.factor).to(device, dtype)
            thresholds = tensors["threshold"].to(device)
            if "router" in tensors:
                experts = {key: tensors[key].to(device) for key in ("router", "expert_of")}
        return evaluate(student, teacher, activation, thresholds, tokens, drop, experts, cfg.evaluate.batch)

    kept = checkpoint.tensors
    base_file = Path(cfg.folder) / f"base-{device.type}-{len(windows)}.json"
    if not base_file.exists():
        rows = {str(d): measure(None, "silu", windows, d) for d in drops}
        found = {"natural": measure(None, "silu", windows), "drops": rows}
        write_atomic(base_file, json.dumps(found).encode())  # runs on other GPUs read it
    state = read_state(folder)
    if state is None:
        raise ConfigError(f"{folder} has no state of the run, with which the rounded factors are compared")
    figures: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "natural": measure(kept, recipe.activation, windows),
        "unrounded": measure({k: v for k, v in state[0].items() if k in kept}, recipe.activation, windows),
        "own": measure(kept, recipe.activation, own),
        "drops": {str(d): measure(kept, recipe.activation, windows, d) for d in drops},
        "base": json.loads(base_file.read_text()),
    }
    write_figures(folder / "adapter", figures)
    natural, base = figures["natural"], figures["base"]["natural"]
    say(
        stdout(),
        f"{name}: perplexity {natural['perplexity']:.2f}, {natural['perplexity'] / base['perplexity']:.3f} "
        f"of the base; zeros {natural['zeros']:.1%}; KL {natural['kl']:.3f}, on own text "
        f"{figures['own']['kl']:.3f}",
    )


def merged(model: Model, tensors: dict[str, torch.Tensor], factor: float) -> Model:
    """The student: `model` with the adapter's tensors merged, fp32."""
    linears = {
        name: merge(w, tensors[f"scale.{name}"], tensors[f"a.{name}"], tensors[f"b.{name}"], factor)
        for name, w in model.linears.items()
    }
    return replace(model, linears=linears)


# ------------------------------------------------------------------------------------- what a person sees


@contextmanager
def tracker(cfg: DictConfig, recipe: Recipe, name: str) -> Iterator[Callable[[dict[str, float]], None]]:
    """Print each entry of the curve and, with logger=wandb, log it there too (offline unless logged in)."""

    def show(entry: dict[str, float]) -> None:
        keys = ("kl", "zeros", "threshold", "chosen", "separability", "tokens_per_second")
        shown = {k: entry[k] for k in keys if k in entry}
        numbers = " ".join(f"{k} {v:.4g}" for k, v in shown.items())
        say(stdout(), f"{name} step {int(entry['step'])} {numbers}")

    if cfg.logger.name == "none":
        yield show
        return
    import wandb

    from harness.report.tracking import PROJECT, logged_in

    mode = "online" if logged_in(wandb.setup().settings.base_url) else "offline"
    facts = {"project": PROJECT, "group": "training", "config": asdict(recipe), "dir": cfg.folder}
    os.environ.setdefault("WANDB_MODE", mode)
    with wandb.init(name=name, **facts) as run:

        def log(entry: dict[str, float]) -> None:
            show(entry)
            run.log(entry, step=int(entry["step"]))

        yield log


if __name__ == "__main__":
    main()
