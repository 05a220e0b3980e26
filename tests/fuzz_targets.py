"""Every file that the house reads, whole, and who reads it."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save

from harness.data.assets import model_fingerprint
from harness.fitting.scratch import Scratch
from harness.report import archive, show
from harness.results import published
from harness.results.collect import collect, dense_key, headline, read_table
from harness.results.find import stored
from harness.results.fits import Fits
from harness.results.identity import cell_id
from harness.results.kept import commit_of, config_of, read_cells, read_environments
from harness.results.samples import read_samples
from harness.results.store import Store
from harness.run import clean, plan
from harness.run.archived import held
from harness.run.canonical import text_fingerprint
from harness.run.estimate import seconds
from harness.run.execute import outcome
from harness.run.overrides import composed
from harness.training.checkpoints import read_checkpoint, save_checkpoint
from tests import synthetic

SLOW = 0.01  # share of a reader that takes a tenth of a second


@dataclass(frozen=True)
class Target:
    """A file (or, without one, a list of words), and who reads it. Readers may raise ConfigError and nothing else."""

    name: str
    read: Callable[..., Any]
    file: Path | None = None
    share: float = 1  # of the inputs, beside the others


def targets(root: Path) -> list[Target]:
    """Everything that is read, over whole files under `root`."""
    torch.manual_seed(0)
    return [
        *_cells(root / "run"),
        *_states(root / "states"),
        *_archives(root / "kept"),
        *_published(root),
        *_configs(root),
    ]


def _cells(root: Path) -> Iterator[Target]:
    store, config = Store(root), synthetic.config("dense", 0.0)
    name = cell_id(config)
    settings_, identity, probes = next(synthetic.cells(tasks=("piqa",)))
    with store.claim(name, settings_, {"method:teal": 1}, identity) as cell:
        text = pd.DataFrame({"window": [0, 1], "nll": [3.0, 4.0], "tokens": [8, 8]})
        answers = {"task": ["piqa"] * 2, "part": ["piqa"] * 2, "doc_id": [0, 1], "metric": ["acc", "acc"]}
        cell.commit("perplexity", probes["quality"][:3], text, {"top": torch.arange(12.0).view(3, 4)})
        cell.commit("quality-piqa", probes["quality"], pd.DataFrame(answers | {"value": [0.0, 1.0], "choices": [2, 2]}))
        lock = (cell.path / "lock.json").read_bytes()
        cell.finish(seconds=1.5, alike=["a"])
    view, folder = store.view(name), store.view(name).path
    (folder / "lock.json").write_bytes(lock)

    def state() -> None:
        store.state(name, {"method:teal": 1})
        outcome(view)
        seconds({}, store)
        clean.things(root)

    def of_config() -> None:
        assert isinstance(view.config, dict)
        dense_key(view.config)
        clean.things(root)

    def shown() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            show.print_cell(show.load(root, name))

    yield Target("cell: status.json", state, folder / "status.json")
    yield Target("cell: status.json, shown", shown, folder / "status.json", SLOW)
    yield Target("cell: config.yaml", of_config, folder / "config.yaml", 1)
    yield Target("cell: config.yaml, shown", shown, folder / "config.yaml", SLOW)
    yield Target("cell: env.json", lambda: commit_of(view.environment), folder / "env.json", 3)
    yield Target("cell: env.json, shown", shown, folder / "env.json", SLOW)
    yield Target("cell: lock.json", state, folder / "lock.json")
    rows = folder / "probes/quality-piqa/rows.parquet"
    yield Target("cell: rows.parquet", lambda: (view.done("quality-piqa"), view.read("quality-piqa")), rows, 2)
    yield Target("cell: rows.parquet, collected", lambda: headline(collect(root)), rows, SLOW)
    yield Target(
        "cell: windows' samples.parquet", lambda: read_samples(root), folder / "probes/perplexity/samples.parquet"
    )
    yield Target("cell: answers' samples.parquet", lambda: read_samples(root), rows.with_name("samples.parquet"))
    tensors = folder / "probes/perplexity/tensors.safetensors"
    yield Target("cell: tensors.safetensors", lambda: (view.done("perplexity"), view.tensors("perplexity")), tensors, 6)


def _states(root: Path) -> Iterator[Target]:
    whole = {"w": torch.arange(6.0), "n": torch.tensor(3)}
    fits, scratch = Fits(root / "fits"), Scratch(root / "layers")
    fits.get("k", lambda: whole)
    scratch.part("p", lambda: whole)

    def equal(found: dict[str, torch.Tensor]) -> None:
        assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)

    # Damage is found by a digest and the fit made again. One that was put there with its own digest is another matter.
    yield Target("fit", lambda: equal(fits.get("k", lambda: whole)), root / "fits/k.safetensors", 2)
    yield Target("layer of a fit", lambda: scratch.part("p", lambda: whole), root / "layers/p.safetensors", 8)
    saved = {
        "a.q": torch.ones(2, 1, 4),
        "b.q": torch.ones(2, 4, 1),
        "scale.q": torch.ones(2),
        "threshold": torch.ones(2),
    }
    save_checkpoint(root / "student", saved, {"name": "s", "activation": "relu", "factor": 1.0, "base": "b"})
    for path in (root / "student").iterdir():
        yield Target(f"checkpoint: {path.name}", lambda: read_checkpoint(root / "student"), path, 4)
    adapter = root / "student/adapter.json"
    shard = next((root / "student").glob("*.safetensors"))

    def with_its_hash() -> None:
        import hashlib

        before = adapter.read_bytes()
        told = json.loads(before) | {"sha256": {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest()}}
        try:
            adapter.write_text(json.dumps(told))
            read_checkpoint(root / "student")
        finally:
            adapter.write_bytes(before)

    yield Target("checkpoint: a shard with its hash", with_its_hash, shard, 6)


def _archives(root: Path) -> Iterator[Target]:
    run = Store(root / "run")
    config = composed(["method=teal", "tasks=none"]) | {
        "model": {"name": "smollm2-135m", "path": None, "source": "embedded"}
    }
    config = {key: value for key, value in config.items() if key not in ("logger", "results")}
    config["model"] |= {"repo": None, "revision": None}
    _, identity, probes = next(synthetic.cells(tasks=("piqa",)))
    with run.claim("teal_1", config, {}, identity) as cell:
        text = pd.DataFrame({"window": [0, 1], "nll": [3.0, 4.0], "tokens": [8, 8]})
        cell.commit("perplexity", probes["quality"][:3], text)
        cell.finish()
    study = root / "study"
    archive.write([root / "run"], study)

    def shown() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            show.print_cell(show.load(study, "teal_1"))

    def again() -> None:
        held.cache_clear()
        held(str(study))

    def cells_of() -> None:
        cells = read_cells(study)
        for text in cells["config"]:
            dense_key(config_of(text, study))
        again()

    yield Target("archive: cells.parquet", cells_of, study / "cells.parquet", 0.2)
    yield Target("archive: cells.parquet, shown", shown, study / "cells.parquet", SLOW)
    yield Target("archive: cells.parquet, read", lambda: archive.read(study), study / "cells.parquet", SLOW)
    environments = study / "environment.json"
    yield Target(
        "archive: environment.json", lambda: [commit_of(e) for e in read_environments(study).values()], environments
    )
    yield Target("archive: environment.json, shown", shown, environments, SLOW)
    yield Target("archive: table.parquet", lambda: stored(study), study / "table.parquet")
    yield Target("archive: table.parquet, asked for", again, study / "table.parquet", 0.1)
    yield Target("archive: table.csv", lambda: read_table(study / "table.csv"), study / "table.csv")
    yield Target("archive: samples.parquet", lambda: read_samples(study), study / "samples.parquet")

    cells = pd.read_parquet(study / "cells.parquet")

    def with_config(tree: Any) -> None:
        cells.assign(config=json.dumps(tree)).to_parquet(study / "cells.parquet", index=False)
        cells_of()

    yield Target("archive: a config in it", with_config, None, 0.2)


def _published(root: Path) -> Iterator[Target]:
    path = root / "published.csv"
    path.write_text("".join(published.PUBLISHED.read_text().splitlines(keepends=True)[:40]))
    yield Target("published.csv", lambda: published.load(path), path, 1)


def _configs(root: Path) -> Iterator[Target]:
    folder = root / "model"
    folder.mkdir()
    facts = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "model.safetensors").write_bytes(save({"w": torch.ones(3)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "added_tokens_decoder": {"0": {}}}))
    of_model = ["model=local", f"model.path={folder}", "method=dense", "tasks=none", "device=cpu"]

    def look() -> None:
        model_fingerprint(folder)
        plan.read(of_model, multirun=False)

    yield Target("config: a model's config.json", look, folder / "config.json")
    yield Target("config: a model's weights", lambda: model_fingerprint(folder), folder / "model.safetensors", 0.5)
    yield Target("config: a tokenizer's", lambda: text_fingerprint(folder), folder / "tokenizer_config.json", 3)
    yield Target("config: a command line", lambda words: plan.read(words, multirun=len(words) % 2 == 0), None, 1)
