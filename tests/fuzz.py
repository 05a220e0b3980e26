"""Damaged and hostile files, made from whole ones: their readers give back what lies there, or raise ConfigError.

`make fuzz` (python -m tests.fuzz --examples 100000 --out results/bench/fuzz.json) tries many; the default suite tries a
few of each. An input is a file with some bytes flipped, cut out, put in or repeated; a JSON or YAML tree in which some
nodes are others; a table in which columns are gone, renamed, retyped or filled with something else; or a command line.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

from harness.data.assets import model_fingerprint
from harness.errors import ConfigError
from harness.fitting.scratch import Scratch
from harness.report import archive, show
from harness.results import published
from harness.results.collect import collect, dense_key, headline, read_table
from harness.results.environment import environment
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

SEED = 20261126
SLOW = 0.01  # share of a reader that takes a tenth of a second
WORDS = [
    "_target_",
    "os.system",
    "methods.teal.Teal",
    "../../x",
    "/etc/passwd",
    "done",
    "failed",
    "running",
    "teal",
    "\ud800",
]

# ------------------------------------------------------------------------------------------------ damage

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([2**70, -1, 1e308, *WORDS])
    | st.text(max_size=8)
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def altered_bytes(draw: Any, whole: bytes) -> bytes:
    """The bytes with one to three changes; most of them small, some of them cuts."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "put", "repeat", "zeros", "tail"]))
        length = draw(st.integers(1, 64))
        if kind == "flip" and content:
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + length]
        elif kind == "put":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "repeat":
            content[at:at] = content[at : at + length]
        elif kind == "zeros":
            content[at : at + length] = bytes(length)
        elif content:  # where Parquet keeps its facts
            place = max(0, len(content) - 1 - at % 2000)
            content[place] ^= draw(st.integers(1, 255))
    return bytes(content)


@st.composite
def altered_tree(draw: Any, whole: Any) -> Any:
    """The tree with one to three nodes replaced, renamed or gone."""
    tree = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        tree = _alter(draw, tree, draw(st.integers(0, 4)))
    return tree


def _alter(draw: Any, node: Any, depth: int) -> Any:
    if not depth or not isinstance(node, dict | list) or not node:
        return draw(trees)
    if isinstance(node, list):
        at = draw(st.integers(0, len(node) - 1))
        return [_alter(draw, inner, depth - 1) if place == at else inner for place, inner in enumerate(node)]
    key = draw(st.sampled_from(sorted(node)))
    kind = draw(st.sampled_from(["inside", "inside", "inside", "gone", "renamed", "more"]))
    if kind == "inside":
        return node | {key: _alter(draw, node[key], depth - 1)}
    rest = {name: inner for name, inner in node.items() if name != key} if kind != "more" else node
    return rest if kind == "gone" else rest | {draw(st.sampled_from(WORDS) | st.text(max_size=6)): node[key]}


@st.composite
def altered_table(draw: Any, whole: pd.DataFrame) -> pd.DataFrame:
    """Some rows of the table, with one to three columns gone, renamed, doubled, retyped or filled anew."""
    count = draw(st.integers(0, min(6, len(whole))))
    frame = whole.head(count).copy()
    for _ in range(draw(st.integers(1, 3))):
        if not len(frame.columns):
            break
        name = draw(st.sampled_from(list(frame.columns)))
        kind = draw(st.sampled_from(["gone", "renamed", "filled", "filled", "one", "order", "text"]))
        if kind == "gone":
            frame = frame.drop(columns=name)
        elif kind == "renamed":
            frame = frame.rename(columns={name: f"{name}_"})
        elif kind == "order":
            frame = frame[list(frame.columns)[::-1]]
        elif kind == "text":
            frame[name] = frame[name].astype("string")
        elif kind == "one" and len(frame):
            values = frame[name].astype(object).tolist()
            values[draw(st.integers(0, len(values) - 1))] = draw(_values)
            frame[name] = values
        else:
            frame[name] = [draw(_values)] * len(frame)
    return frame


_texts = st.sampled_from([word for word in WORDS if word.isascii()]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=6
)
_values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | _texts


def parquet(frame: pd.DataFrame) -> bytes:
    """The table as a file; as texts where its values are of several types."""
    try:
        return _parquet(frame)
    except (TypeError, ValueError):  # pyarrow's ArrowInvalid is one
        return _parquet(frame.astype("string"))


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def files(whole: bytes, path: Path) -> st.SearchStrategy[bytes]:
    """Damaged contents of a file of this kind."""
    damage = altered_bytes(whole)
    if path.suffix == ".json":
        damage |= altered_tree(json.loads(whole)).map(lambda tree: json.dumps(tree).encode())
    elif path.suffix == ".yaml":
        told = functools.partial(yaml.safe_dump, allow_unicode=False)
        damage |= altered_tree(yaml.safe_load(whole)).map(lambda tree: told(tree).encode("utf-8", "surrogatepass"))
    elif path.suffix == ".parquet":
        damage |= altered_table(pd.read_parquet(path)).map(parquet)
    elif path.suffix == ".csv":
        frame = pd.read_csv(path, nrows=40)
        damage |= altered_table(frame).map(lambda frame: frame.to_csv(index=False).encode("utf-8", "surrogatepass"))
    return damage


# ------------------------------------------------------------------------------------------------ what is read


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


KEYS = """
method model tasks probe sparsity scope phase seed dtype device batch_size dense_prefix tasks.limit tasks.names workers
tasks.num_fewshot calibration.tokens calibration.window calibration.path calibration.text probe.names on_error x
probe.latency.batch probe.perplexity.windows method.teal.sparsity method.teal.weighted method.teal._target_
model.source model.adapter experiment size sweeps archived results +method.mine._target_ ~tasks model.path
""".split()
VALUES = """
teal dense random cats [relu,teal] [dense,dense] 0.5 1.5 -1 nan inf null true [] {} [1,2] {a:1} a,b 0.1,0.2
../../etc os.system antigravity.x methods.teal.Teal methods.nothing.X search quality [quality] [piqa,sciq] none cpu
range(1,3) piqa cuda:99 bfloat16 '' '[' ${sparsity} ${nothing} ${grid.models} ??? 1e400 glob(*) choice(1,2) embedded
hub shape local
""".split()
words = st.lists(
    st.builds("{}={}".format, st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text(max_size=8))
    | st.text(max_size=12),
    max_size=5,
)


def strategy(target: Target) -> st.SearchStrategy[Any]:
    """What a target is given: a file's damaged content, or the argument of its reader."""
    if target.file is not None:
        return files(target.file.read_bytes(), target.file)
    if target.name.startswith("archive"):
        return altered_tree(_config())
    return words


def _config() -> Any:
    plain = composed(["method=teal", "tasks=none"])
    return {key: value for key, value in plain.items() if key not in ("logger", "results")}


def run(target: Target, examples: int, tally: Counter[str], number: int = 0) -> None:
    """Give a target so many inputs. Anything but ConfigError comes out, with the input that did it."""
    whole = None if target.file is None else target.file.read_bytes()

    @seed(SEED + number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy(target))
    def one(content: Any) -> None:
        tally["inputs"] += 1
        try:
            if target.file is None:
                target.read(content)
            else:
                target.file.write_bytes(content)
                target.read()
            tally["read"] += 1
        except ConfigError as error:
            assert str(error).strip() and "\n" not in str(error), "a sentence of one line"
            tally["refused"] += 1

    try:
        one()
    finally:
        if target.file is not None and whole is not None:
            target.file.write_bytes(whole)


def main() -> int:
    """Fuzz everything, and write how many inputs of each kind there were and what became of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path)
    given_ = parser.parse_args()
    start, lines, wrong = time.time(), {}, []
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    found = [target for target in targets(root) if given_.only in target.name]
    share = sum(target.share for target in found)
    for number, target in enumerate(found):
        tally: Counter[str] = Counter(inputs=0, read=0, refused=0)
        count = math.ceil(given_.examples * target.share / share)
        began, part = time.time(), 0
        while tally["inputs"] < count and target.name not in wrong:  # hypothesis stops early where it runs out of news
            before = tally["inputs"]
            try:
                run(target, min(1000, count - tally["inputs"]), tally, 1000 * number + part)
            except BaseException as error:  # the report is what this is for
                if isinstance(error, KeyboardInterrupt):
                    raise
                wrong.append(target.name)
                print(f"{target.name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
                if given_.only:
                    raise
            part += 1
            if tally["inputs"] == before:
                break
        lines[target.name] = dict(tally)
        print(
            f"{target.name:36} {tally['inputs']:7} {tally['refused']:7} refused  {time.time() - began:6.1f} s",
            flush=True,
        )
    shutil.rmtree(root)
    total = {key: sum(line[key] for line in lines.values()) for key in ("inputs", "read", "refused")}
    print(total, "other errors:", len(wrong))
    if given_.out:
        result = {
            "what": "damaged and hostile files given to their readers; anything but ConfigError is another error",
            "inputs": total["inputs"],
            "other_errors": len(wrong),
            "seed": SEED,
            "seconds": round(time.time() - start),
            "total": total,
            "by_file": lines,
            "environment": {k: v for k, v in environment().items() if k in ("packages", "python", "git")},
        }
        given_.out.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
