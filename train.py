"""The second app, `python train.py train=relu`: train the counterparts of the embedded model (conf/training.yaml)."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file, save_file

from harness.console import complain, say, stdout
from harness.errors import AssetError, ConfigError
from harness.places import CONF
from harness.progress import counting
from harness.training.adapter import cut, merge
from harness.training.card import write_card
from harness.training.checkpoints import read_checkpoint, save_checkpoint
from harness.training.data import Batches, prepare, read_tokens
from harness.training.evaluate import evaluate
from harness.training.experts import cached_cluster
from harness.training.generate import starts, write
from harness.training.llama import Model
from harness.training.loop import Recipe, Trainer

ConfigStore.instance().store(group="train", name="recipe", node=Recipe)


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
    name = cfg.device if cfg.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        torch.use_deterministic_algorithms(True)
    model_dir = _model_dir(cfg)
    model = read_model(model_dir)
    text = Path(cfg.folder) / "text"
    prepare(model_dir, text)
    if "text" in cfg.do:
        write_text(cfg, model, text, device)
    if "train" in cfg.do:
        train(cfg, recipe, model, text, device)
    if "evaluate" in cfg.do:
        score(cfg, recipe, model, text, device)


def _model_dir(cfg: DictConfig) -> Path:
    if cfg.model.path is not None:
        folder = Path(cfg.model.path)
        if not (folder / "config.json").exists():
            raise ConfigError(f"model.path={folder} holds no config.json")
        return folder
    from harness.data.assets import embedded_model_dir

    return embedded_model_dir()


def read_model(folder: Path) -> Model:
    """The frozen weights of a Hugging Face LLaMA folder (one safetensors file, tied head)."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llama" or not config.get("tie_word_embeddings"):
        raise ConfigError(f"{folder} is not a LLaMA with a tied head: only those are trained here")
    return Model.of(config, load_file(folder / "model.safetensors"))


# ------------------------------------------------------------------------------------------------- stages


def write_text(cfg: DictConfig, model: Model, folder: Path, device: torch.device) -> None:
    """Let the model write `text.tokens` tokens into FOLDER/own-SEED and heldout-SEED, unless they are there."""
    t = cfg.text
    target = folder / f"own-{t.seed}.safetensors"
    if target.exists():
        return
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    writer = model.to(device, dtype)
    (real,) = read_tokens(folder, "real.safetensors")
    rounds = max(1, round(t.tokens / (t.batch * t.length)))
    done, since = [], time.perf_counter()
    with counting(rounds * (t.length - 1), "writing text") as advance:
        for index in range(rounds):
            seed = t.seed * 1_000_003 + index
            generator = torch.Generator().manual_seed(seed)
            begun, given = starts(real, t.batch, t.length, t.shortest, t.longest, t.bare, generator)
            warmth = torch.tensor(list(t.temperatures)).repeat(t.batch)[: t.batch].to(device)
            tokens = begun.to(device)
            write(writer, tokens, given.to(device), warmth, seed, device.type == "cuda", advance)
            done.append(tokens.to("cpu", torch.int32).flatten())
    stream = torch.cat(done)
    say(stdout(), f"wrote {len(stream):,} tokens at {len(stream) / (time.perf_counter() - since):,.0f} tokens/s")
    heldout = min(t.heldout, len(stream) // 8)
    save_file({"tokens": stream[-heldout:].clone()}, folder / f"heldout-{t.seed}.safetensors")
    save_file({"tokens": stream[:-heldout].clone()}, target)


def train(cfg: DictConfig, recipe: Recipe, model: Model, text: Path, device: torch.device) -> None:
    """Distil one variant, resuming FOLDER/NAME if it has a state, and write its adapter."""
    folder = Path(cfg.folder) / recipe.name
    own = torch.cat(read_tokens(text, "own-*.safetensors"))
    (real,) = read_tokens(text, "real.safetensors")
    batches = Batches(own.to(device), real.to(device), recipe.real_share, recipe.batch, recipe.length, recipe.seed)
    experts = None
    if recipe.expert_size:
        layers = model.shape.layers
        with counting(layers, "clustering neurons") as advance:
            path = text.parent / f"experts-{recipe.expert_size}.safetensors"
            experts = cached_cluster(model, recipe.expert_size, recipe.seed, path, advance)
    init = read_checkpoint(recipe.init_from).tensors if recipe.init_from else None
    trainer = Trainer(recipe, model, batches, device, init, experts)
    if trainer.load(folder):
        say(stdout(), f"{recipe.name}: going on from step {trainer.step:,}")
    speeds: list[dict[str, float]] = []
    started = time.perf_counter()
    bar = counting(recipe.steps, f"training {recipe.name}", trainer.step, stays=True)
    with bar as advance, tracker(cfg, recipe) as track:

        def report(entry: dict[str, float]) -> None:
            speeds.append(entry)
            advance.at(int(entry["step"]))
            track(entry)

        trainer.run(folder, cfg.log_every, cfg.save_every, report, cfg.stop_at)
    if trainer.step < recipe.steps:
        return
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
        "name": recipe.name,
        "activation": recipe.activation,
        "factor": recipe.factor,
        "threshold": float(trainer.threshold),
        "experts": recipe.expert_size,
        "base": model_fingerprint(_model_dir(cfg)),
        "recipe": asdict(recipe) | {"init_from": _origin(recipe)},
        "run": run,
        "history": trainer.history,
    }
    save_checkpoint(folder / "adapter", cut(trainer.adapter_tensors(), recipe.ship_rank), record)


def _origin(recipe: Recipe) -> str | None:
    """The name of the adapter that the run went on from, without the folders of this machine."""
    if recipe.init_from is None:
        return None
    return str(read_checkpoint(recipe.init_from).record["name"])


def score(cfg: DictConfig, recipe: Recipe, model: Model, text: Path, device: torch.device) -> None:
    """Evaluate FOLDER/NAME/adapter as shipped, next to the base, and write its model card."""
    folder = Path(cfg.folder) / recipe.name
    checkpoint = read_checkpoint(folder / "adapter")
    (windows,) = read_tokens(text, "windows.safetensors")
    windows = windows[: cfg.evaluate.windows]
    heldout = torch.cat(read_tokens(text, "heldout-*.safetensors"))
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
        base_file.write_text(json.dumps({"natural": measure(None, "silu", windows), "drops": rows}))
    unrounded = {k: v for k, v in load_file(folder / "state.safetensors").items() if k in kept}
    record = dict(checkpoint.record)
    record["evaluation"] = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "natural": measure(kept, recipe.activation, windows),
        "unrounded": measure(unrounded, recipe.activation, windows),
        "own": measure(kept, recipe.activation, own),
        "drops": {str(d): measure(kept, recipe.activation, windows, d) for d in drops},
        "base": json.loads(base_file.read_text()),
    }
    (folder / "adapter" / "adapter.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "adapter" / "README.md").write_text(write_card(record))
    natural, base = record["evaluation"]["natural"], record["evaluation"]["base"]["natural"]
    say(
        stdout(),
        f"{recipe.name}: perplexity {natural['perplexity']:.2f}, {natural['perplexity'] / base['perplexity']:.3f} "
        f"of the base; zeros {natural['zeros']:.1%}; KL {natural['kl']:.3f}, on own text "
        f"{record['evaluation']['own']['kl']:.3f}",
    )


def merged(model: Model, tensors: dict[str, torch.Tensor], factor: float) -> Model:
    """The student: `model` with the adapter's tensors merged, fp32."""
    linears = {
        name: merge(w, tensors[f"scale.{name}"], tensors[f"a.{name}"], tensors[f"b.{name}"], factor)
        for name, w in model.linears.items()
    }
    return Model(model.shape, linears, model.norms, model.embedding, model.final_norm)


# ------------------------------------------------------------------------------------- what a person sees


@contextmanager
def tracker(cfg: DictConfig, recipe: Recipe) -> Iterator[Callable[[dict[str, float]], None]]:
    """Print each entry of the curve and, with logger=wandb, log it there too (offline unless logged in)."""

    def show(entry: dict[str, float]) -> None:
        keys = ("kl", "zeros", "threshold", "chosen", "separability", "tokens_per_second")
        shown = {k: entry[k] for k in keys if k in entry}
        numbers = " ".join(f"{k} {v:.4g}" for k, v in shown.items())
        say(stdout(), f"{recipe.name} step {int(entry['step'])} {numbers}")

    if cfg.logger.name == "none":
        yield show
        return
    import wandb

    from harness.report.tracking import PROJECT, logged_in

    mode = "online" if logged_in(wandb.setup().settings.base_url) else "offline"
    facts = {"project": PROJECT, "group": "training", "config": asdict(recipe), "dir": cfg.folder}
    os.environ.setdefault("WANDB_MODE", mode)
    with wandb.init(name=recipe.name, **facts) as run:

        def log(entry: dict[str, float]) -> None:
            show(entry)
            run.log(entry, step=int(entry["step"]))

        yield log


if __name__ == "__main__":
    main()
