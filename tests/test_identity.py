"""What a cell's id stands for: everything that can change its numbers, resolved, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from harness.errors import ConfigError
from harness.results.collect import dense_key
from harness.results.identity import RUN_KEYS, cell_id, content_key
from harness.results.kept import CELLS
from harness.results.store import Store
from harness.run import canonical, machine, session
from harness.run.archived import held
from harness.run.cell import identity
from harness.run.config import CellConfig, check
from harness.run.nest import build_methods
from harness.run.overrides import composed, rewrite
from methods.random import Random
from methods.teal import Teal
from tests import tiny

STUDY = Path(__file__).parents[1] / "results" / "study"


def cell(*overrides: str) -> CellConfig:
    """One checked cell, as the command line makes it."""
    return check(composed(rewrite(list(overrides), multirun=False)))


def computer(monkeypatch: pytest.MonkeyPatch, *gpus: str, cpu: str = "a CPU", bfloat16: bool = False) -> None:
    """Pretend to run on a machine with these GPUs."""
    monkeypatch.setattr(machine, "gpu_count", lambda: len(gpus))
    monkeypatch.setattr(machine, "gpu_name", lambda index: gpus[index])
    monkeypatch.setattr(machine, "cpu_name", lambda: cpu)
    monkeypatch.setattr(machine, "cpu_has_bfloat16", lambda: bfloat16)


# ------------------------------------------------------------------------------- what was asked for


LEVELLESS = {
    "budget": ["method=cett", "method.cett.cett=0.2"],
    "routers": ["method=lte", "method.lte.checkpoint=lte", "model=smollm2-135m-lte"],
    "nest": ["method=[relu2,cett]", "method.cett.cett=0.2"],
    "search": ["method=cett", "probe=search"],
}


@pytest.mark.parametrize("name", LEVELLESS)
def test_a_number_that_nothing_reads_is_no_part_of_a_cell_and_in_no_label(name: str) -> None:
    one, other = (cell(*LEVELLESS[name], f"sparsity={level}") for level in (0.3, 0.6))
    assert one.id == other.id
    assert one["sparsity"] is None and "s0." not in one.id.removeprefix(one.model_name)
    assert identity(one, build_methods(one["method"]))["sparsity_requested"] is None


def test_the_id_says_what_was_asked_for_instead() -> None:
    assert "_cett_cett-0.2_" in cell(*LEVELLESS["budget"]).id
    assert "_lte_checkpoint-lte_" in cell(*LEVELLESS["routers"]).id
    assert "_cett_search_" in cell(*LEVELLESS["search"]).id


def test_a_level_that_something_reads_stays() -> None:
    assert cell("method=cett", "sparsity=0.3").id != cell("method=cett", "sparsity=0.6").id
    assert cell("method=dense")["sparsity"] == 0.0
    off = cell(*LEVELLESS["routers"], "sparsity=0")  # for routers 0 means off
    assert off["sparsity"] == 0.0 and off.id != cell(*LEVELLESS["routers"]).id
    beside = [cell("method=[teal,cett]", "method.cett.cett=0.2", f"sparsity={level}").id for level in (0.3, 0.6)]
    assert beside[0] != beside[1], "one method of the nest reads it"
    assert cell("method=relu", "sparsity=0")["sparsity"] == 0.0


def test_a_cell_without_a_level_does_what_it_did() -> None:
    method = build_methods(cell(*LEVELLESS["routers"])["method"])[0]
    assert method.sparsity > 0 and "neurons" in method.sites
    swap, inner = build_methods(cell("method=[relu2,teal]", "sparsity=0.4")["method"])
    assert (swap.sparsity, inner.sparsity) == (0.0, 0.4)


def test_canonical_facts_come_out_as_they_are() -> None:
    for overrides in (*LEVELLESS.values(), ["method=teal"], ["method=dense"], ["method=[relu2,teal]"]):
        plain = cell(*overrides).plain
        assert canonical.canonical(plain) == plain


def test_one_cell_has_one_requested_sparsity() -> None:
    with pytest.raises(ConfigError, match=r"give sparsity=, not method\.teal\.sparsity="):
        cell("method=teal", "sparsity=0.5", "method.teal.sparsity=0.3")


# ----------------------------------------------------------------------------------------- the machine


def test_auto_is_resolved_before_the_id_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    computer(monkeypatch)
    plain = cell()
    assert (plain["device"], plain["dtype"]) == ("cpu", "float32")
    assert plain.id == cell("device=cpu", "dtype=float32").id
    computer(monkeypatch, bfloat16=True)
    assert cell().id == cell("dtype=bfloat16").id != plain.id
    computer(monkeypatch, "H100", "H100")
    assert (cell()["device"], cell()["dtype"], cell()["processor"]) == ("cuda", "bfloat16", "H100")
    assert cell().id not in (plain.id, cell("dtype=float32").id)


def test_a_results_folder_that_moves_to_a_gpu_mixes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    computer(monkeypatch)
    before = cell("method=teal")
    computer(monkeypatch, "H100")
    after = cell("method=teal")
    assert before.id != after.id
    dense = [c.dense_cell() for c in (before, after)]
    assert dense[0].id != dense[1].id
    assert dense_key(dense[0].plain) == dense_key(before.plain) != dense_key(after.plain) == dense_key(dense[1].plain)


def test_equal_gpus_make_no_difference_and_unlike_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    computer(monkeypatch, "H100", "H100", "A100")
    one, other, unlike = (cell(f"device=cuda:{index}") for index in range(3))
    assert one.id == other.id != unlike.id
    assert [c.device for c in (one, other, cell("device=cuda"))] == ["cuda:0", "cuda:1", "cuda"]
    assert one.dense_cell().device == "cuda:0"


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    computer(monkeypatch)
    with pytest.raises(ConfigError, match="device=cuda, but no GPU is to be seen"):
        cell("device=cuda")
    computer(monkeypatch, "H100")
    with pytest.raises(ConfigError, match="device=cuda:1, but only 1 GPU"):
        cell("device=cuda:1")


def test_the_cpu_counts_where_something_is_timed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {}
    for name in ("fast", "slow"):
        computer(monkeypatch, cpu=name)
        ids[name] = cell("probe=latency").id, cell("probe=sparsity").id
    assert ids["fast"][0] != ids["slow"][0] and ids["fast"][1] == ids["slow"][1]


# ------------------------------------------------------------------------------------ keys of the run


def test_keys_of_the_run_are_dropped_at_the_top_only() -> None:
    base = {"model": "m", "method": {"x": {"_target_": "a.B", "progress": 1, "logger": "a", "results": 3}}}
    assert cell_id(base | {"results": "/x", "logger": "none", "retry": True}) == cell_id(base)
    for key in ("progress", "logger", "results"):
        other = {"x": base["method"]["x"] | {key: "other"}}
        assert cell_id(base | {"method": other}) != cell_id(base)
    assert content_key({"retry": True}) != content_key({})


def test_every_key_of_the_config_is_of_the_run_or_measured() -> None:
    plain = composed([])
    assert not RUN_KEYS & cell().plain.keys()
    assert plain.keys() - RUN_KEYS - {"size"} == cell().plain.keys() - {"processor"}


# ----------------------------------------------------------------------------------- a model's folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a model's folder holds, as far as ids go."""
    path = tmp_path / "a-model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "tokenizer.json").write_text('{"model": 1}')
    (path / "generation_config.json").write_text('{"eos_token_id": 1, "transformers_version": "5.0"}')
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model": 2}'),
        ("tokenizer_config.json", '{"add_bos_token": true}'),
        ("special_tokens_map.json", '{"pad_token": "<pad>"}'),
        ("chat_template.jinja", "{{ messages }}"),
        ("generation_config.json", '{"eos_token_id": 2}'),
        ("tokenizer.model", "sentencepiece"),
        ("merges.txt", "a b"),
        ("model.safetensors", "other weights"),
        ("config.json", '{"rope_theta": 1}'),
    ],
)
def test_what_makes_tokens_or_shapes_answers_is_part_of_a_cell(folder: Path, name: str, content: str) -> None:
    before = cell("model=local", f"model.path={folder}").id
    (folder / name).write_text(content)
    assert cell("model=local", f"model.path={folder}").id != before


def test_who_wrote_a_file_and_where_it_lies_are_no_part_of_a_cell(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("some words")
    ids = [cell("model=local", f"model.path={folder}", f"probe.perplexity.path={text}")]
    (folder / "generation_config.json").write_text('{"transformers_version": "5.1", "eos_token_id": 1}')
    (folder / "README.md").write_text("about")
    moved = folder.rename(folder.parent / "elsewhere-a-model").rename(tmp_path / "there") / "."
    elsewhere = text.rename(tmp_path / "words")
    again = ["model=local", f"model.path={moved}", "model.name=a-model", f"probe.perplexity.path={elsewhere}"]
    ids.append(cell(*again))
    assert ids[0].id == ids[1].id
    assert dense_key(ids[0].plain) == dense_key(ids[1].plain)


def test_a_local_model_is_named_after_its_folder(folder: Path) -> None:
    assert cell("model=local", f"model.path={folder}").id.startswith("a-model_teal_")
    assert cell("model=local", f"model.path={folder}/").model_name == "a-model"
    assert cell("model=local", f"model.path={folder}", "model.name=mine").model_name == "mine"


def test_a_branch_of_the_hub_is_resolved_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    commits = {"main": "a" * 40, "b" * 40: "b" * 40}
    snapshots = {revision: tmp_path / "snapshots" / commit / "config.json" for revision, commit in commits.items()}
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda repo, file, revision: str(snapshots[revision])
    )
    first = cell("model=mistral-7b", "model.revision=main")
    assert first["model"]["revision"] == "a" * 40
    snapshots["main"] = snapshots["b" * 40]  # the branch has moved
    assert (
        cell("model=mistral-7b", "model.revision=main").id == cell("model=mistral-7b", f"model.revision={'b' * 40}").id
    )
    assert cell("model=mistral-7b", "model.revision=main").id != first.id


# -------------------------------------------------------------------------------- an archived study


def test_cells_of_the_committed_study_are_recognised_where_they_would_be_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computer(monkeypatch, "NVIDIA H100 80GB HBM3")
    asked = ["experiment=pitfalls", "size=full", "model=smollm2-135m", "probe.names=[quality,sparsity]"]
    known = held(str(STUDY))
    assert cell(*asked, "method=teal", "sparsity=0.5").id in known
    assert cell(*asked, "method=cett", "method.cett.cett=0.2").id in known
    assert cell(*asked, "method=teal", "sparsity=0.5", "dtype=float32").id not in known
    computer(monkeypatch, "A100")
    assert cell(*asked, "method=teal", "sparsity=0.5").id not in known
    recorded = pd.read_parquet(STUDY / "cells.parquet", columns=["cell_id", "config"])
    assert set(recorded["cell_id"]) <= known
    older = recorded["config"].map(lambda config: "processor" not in json.loads(config)).sum()
    assert older > 400 and len(known) > len(recorded) + 0.9 * older, "nearly every older cell has an id of today"


def test_an_archived_cell_of_today_is_recognised_as_it_is(tmp_path: Path) -> None:
    one = cell("device=cpu", "dtype=float32")
    facts = {"cell_id": one.id, "config": json.dumps(one.plain)}
    frame = pd.DataFrame([dict.fromkeys(CELLS) | facts])
    frame.to_parquet(tmp_path / "cells.parquet")
    frame.assign(device="cpu: x", dtype="float32").to_parquet(tmp_path / "table.parquet")
    assert held(str(tmp_path)) == {one.id}


# ------------------------------------------------------------------------------------------- a nest's fits


def test_a_fit_belongs_to_all_that_the_methods_outside_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What teal learns under other dropped channels is another fit, in whichever order the two cells run."""
    windows = tiny.tokens(4, 32)
    monkeypatch.setattr(session, "calibration_windows", lambda *_: windows)
    config = cell("method=[random,teal]", "device=cpu", "dtype=float32")

    def learnt(seed: int, store: Store) -> Tensor:
        loaded = session.Loaded(tiny.view("llama"), None, 512)
        _, (_, state) = session.fitted(loaded, [Random(0.5, seed=seed), Teal(0.5)], config, store)
        return next(iter(state.values()))

    store = Store(tmp_path / "one")
    first, second = learnt(0, store), learnt(1, store)
    assert len(store.fits.made()) == 2 and not torch.equal(first, second)
    backwards = Store(tmp_path / "other")
    assert torch.equal(learnt(1, backwards), second) and torch.equal(learnt(0, backwards), first)
