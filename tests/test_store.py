"""Cells survive whatever happens to the process that writes them; nothing is ever mixed or half there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ConfigError, NotANumberError, UnsupportedError
from harness.results import store as store_module
from harness.results.cells import SchemaError
from harness.results.identity import cell_id, content_key
from harness.results.rows import COLUMNS
from harness.results.store import Store
from tests.one_cell import CONFIG, ROOT, ROW, VERSIONS, claim

# ---- identity


def test_cell_id_is_readable_and_ignores_volatile_keys_order_and_number_spelling() -> None:
    base = cell_id(CONFIG)
    assert base.startswith("tiny_teal_s0.4_")
    moved = {"seed": 0.0, "sparsity": 0.4, "method": {"name": "teal"}, "model": {"name": "tiny"}}
    assert cell_id(moved | {"results": "/x", "logger": "none", "hydra": {"a": 1}}) == base
    assert cell_id(CONFIG | {"sparsity": 0.5}) != base
    assert cell_id(CONFIG | {"device_index": 3}) == base
    assert cell_id(CONFIG | {"sparsity": None}) != base
    assert cell_id({"model": "a/b c", "method": "x"}).startswith("a-b-c_x_")
    nested = {"model": "m", "method": {"relu2": {"_target_": "a.B"}, "cett": {"_target_": "c.D"}}}
    assert cell_id(nested | {"sparsity": 0.0}).startswith("m_relu2+cett_s0_")


@given(
    st.dictionaries(st.text(max_size=5), st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)),
    st.randoms(),
)
def test_content_key_does_not_depend_on_key_order(facts: dict, random) -> None:
    keys = list(facts)
    random.shuffle(keys)
    assert content_key({key: facts[key] for key in keys}) == content_key(facts)


def test_content_key_tells_apart_what_differs() -> None:
    values = [
        {"a": 1},
        {"a": "1"},
        {"a": True},
        {"a": None},
        {"a": [1]},
        {"a": {"b": 1}},
        {"b": 1},
        {"a": 1.5},
    ]
    assert len({content_key(value) for value in values}) == len(values)


# ---- the life of a cell


def test_states_from_run_to_skip(store: Store) -> None:
    assert store.state("c", VERSIONS) == "run"
    with claim(store) as cell:
        assert store.state("c", VERSIONS) == "locked"
        assert not cell.done("quality")
        cell.commit("quality", [ROW])
        assert cell.done("quality")
    assert store.state("c", VERSIONS) == "partial"
    with claim(store) as cell:
        assert cell.done("quality")
        cell.finish()
    assert store.state("c", VERSIONS) == "skip"
    assert store.cells() == ["c"]


def test_what_is_committed_is_read_back_typed(store: Store) -> None:
    samples = pd.DataFrame({"doc": [0, 1], "correct": [True, False]})
    shared = torch.arange(6.0)
    tensors = {"a": shared[:3], "b": shared[1:], "c": torch.ones(2, dtype=torch.bfloat16)}
    with claim(store) as cell:
        cell.commit("quality", [ROW, ROW | {"layer": 3}], samples, tensors)
    view = store.view("c")
    rows = view.read("quality")
    assert {name: str(kind) for name, kind in rows.dtypes.items()} == COLUMNS
    assert rows["model"].tolist() == ["tiny", "tiny"] and rows["cell_id"].tolist() == ["c", "c"]
    assert rows["probe"].tolist() == ["quality", "quality"]
    assert rows["layer"].isna().tolist() == [True, False]
    pd.testing.assert_frame_equal(view.samples("quality"), samples)
    assert all(torch.equal(view.tensors("quality")[name], tensors[name]) for name in tensors)
    assert view.config == CONFIG
    assert view.environment["python"]


def test_what_is_learnt_later_describes_later_rows(store: Store) -> None:
    with claim(store) as cell:
        cell.describe(family="llama")
        cell.commit("quality", [ROW, ROW | {"family": "opt"}])
        assert cell.read("quality")["family"].tolist() == ["llama", "opt"]


def test_recommit_replaces_a_probe(store: Store) -> None:
    with claim(store) as cell:
        cell.commit("quality", [ROW, ROW], pd.DataFrame({"a": [1]}))
        cell.commit("quality", [ROW])
        assert len(cell.read("quality")) == 1
        assert not (cell.path / "probes/quality/samples.parquet").exists()


@pytest.mark.parametrize(
    ("error", "status", "state"),
    [
        (RuntimeError("boom"), "failed", "failed"),
        (MemoryError(), "oom", "failed"),
        (NotANumberError("the logits are NaN"), "invalid", "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom", "failed"),
        (RuntimeError("CUDA error: out of memory"), "oom", "failed"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "oom", "failed"),
        (UnsupportedError("opt has no gate"), "unsupported", "unsupported"),
    ],
)
def test_an_error_is_recorded_at_once_with_one_row(store: Store, error, status: str, state: str) -> None:
    with claim(store) as cell:
        cell.commit("sparsity", [ROW])
        cell.fail(error)
        assert cell.status["status"] == status
        assert type(error).__name__ in (cell.path / "error.txt").read_text()
    assert store.state("c", VERSIONS) == state
    row = store.view("c").read("status").iloc[0]
    assert (row["status"], row["model"]) == (status, "tiny")
    assert row["message"] == (str(error) or type(error).__name__)
    with claim(store) as cell:  # trying again keeps the whole probes and forgets the failure
        assert cell.probes() == ["sparsity"]
        assert not cell.done("status") and not (cell.path / "error.txt").exists()
        cell.finish()
    assert store.state("c", VERSIONS) == "skip"


def test_an_error_that_leaves_the_claim_is_recorded_and_an_interrupt_is_not(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), claim(store):
        raise ZeroDivisionError("x")
    assert store.state("c", VERSIONS) == "failed"
    assert "ZeroDivisionError" in (store.view("c").path / "error.txt").read_text()
    with pytest.raises(KeyboardInterrupt), claim(store, "d") as cell:
        cell.commit("quality", [ROW])
        raise KeyboardInterrupt
    assert store.state("d", VERSIONS) == "partial"


def test_a_cell_that_starts_afresh_keeps_nothing(store: Store) -> None:
    with claim(store) as cell:
        cell.commit("quality", [ROW])
        cell.finish(seconds=1.5)
    assert store.view("c").status["seconds"] == 1.5
    with store.claim("c", CONFIG, VERSIONS, afresh=True) as cell:
        assert cell.probes() == [] and "seconds" not in cell.status


def test_other_versions_make_a_cell_stale_and_running_it_again_mixes_nothing(store: Store) -> None:
    with claim(store) as cell:
        cell.commit("quality", [ROW])
        cell.finish()
    assert store.state("c", {"method": 2}) == "stale"
    with claim(store, versions={"method": 2}) as cell:
        assert cell.probes() == []
        cell.commit("sparsity", [ROW])
        cell.finish()
    assert store.state("c", {"method": 2}) == "skip"
    assert store.view("c").probes() == ["sparsity"]


def test_another_row_schema_makes_a_cell_stale(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with claim(store) as cell:
        cell.finish()
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", 999)
    assert store.state("c", VERSIONS) == "stale"


def test_drifted_columns_are_refused_when_read(store: Store) -> None:
    with claim(store) as cell:
        cell.commit("quality", [ROW])
    path = store.view("c").path / "probes/quality/rows.parquet"
    pd.read_parquet(path).rename(columns={"unit": "units"}).to_parquet(path)
    with pytest.raises(SchemaError, match="unit"):
        store.view("c").read("quality")


# ---- killed


def test_what_is_committed_is_on_the_disk_before_its_name_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def note_sync(handle: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def note_rename(path: Path, to: Path) -> Path:
        events.append(("rename", str(to)))
        return rename(path, to)

    def note_replace(path: Path, to: Path) -> None:
        events.append(("rename", str(to)))
        replace(path, to)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(os, "replace", note_replace)
    with claim(store) as cell:
        events.clear()
        cell.commit("quality", [ROW], pd.DataFrame({"a": [1]}), {"t": torch.ones(2)})
        named = events.index(("rename", str(cell.path / "probes/quality")))
        before = {Path(path).name for kind, path in events[:named] if kind == "sync"}
        assert before >= {"rows.parquet", "samples.parquet", "tensors.safetensors"}
        assert any(name.startswith(".draft-") for name in before), "the folder's entries too"
        assert ("sync", str(cell.path / "probes")) in events[named:]
        events.clear()
        cell.finish()
        named = events.index(("rename", str(cell.path / "status.json")))
        assert any("status.json" in path for kind, path in events[:named] if kind == "sync")
        assert ("sync", str(cell.path)) in events[named:]


def test_what_killed_processes_were_writing_is_removed(store: Store) -> None:
    with claim(store) as cell:
        cell.finish()
    store.fits.get("k", dict)
    draft = uuid.uuid4().hex
    left = [cell.path / f".status.json-{draft}", cell.path / f".lock.json-{draft}"]
    left.append(store.root / f"fits/.k.safetensors-{draft}")
    others = store.root / f"fits/.other.safetensors-{draft}"  # whose guard nobody here holds
    for path in (*left, others):
        path.write_text("half")
    with claim(store):
        pass
    store.fits.get("k", lambda: pytest.fail("made twice"))
    assert not [path for path in left if path.exists()] and others.exists()


WRITER = """
import sys, numpy as np, pandas as pd, torch
from harness.results.store import Store
samples = pd.DataFrame({"x": np.arange(200_000)})
row = {"metric": "acc", "value": 0.5, "n": 10, "unit": "share"}
with Store(sys.argv[1]).claim("c", {}, {}) as cell:
    print("claimed", flush=True)
    for number in range(10_000):
        cell.commit(f"p{number % 7}", [row] * 500, samples, {"t": torch.full((50_000,), float(number))})
"""


def test_sigkill_at_any_moment_leaves_whole_probes(store: Store) -> None:
    for delay in (0.03, 0.2):
        command = [sys.executable, "-c", WRITER, str(store.root)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == b"claimed\n"
            assert store.state("c", {}) == "locked"
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        assert store.state("c", {}) in ("partial", "run")  # its lock counts no longer
        for probe in store.view("c").probes():
            assert len(store.view("c").read(probe)) == 500
            assert len(store.view("c").samples(probe)) == 200_000
            assert store.view("c").tensors(probe)["t"].shape == (50_000,)
    with store.claim("c", {}, {}) as cell:
        assert not list((cell.path / "probes").glob(".*"))


# ---- where it ran


def test_the_environment_is_known_even_without_git_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.results.environment import environment

    full = environment.__wrapped__()
    assert full["packages"]["torch"] and full["cpu"] and full["cores"] >= 1
    json.dumps(full)
    monkeypatch.setenv("PATH", "")
    bare = environment.__wrapped__()
    assert bare["git"] == {"commit": None, "dirty": None} and bare["gpus"] == []
    assert bare["packages"] == full["packages"]


# ---- the place


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="can't be written"):
            Store(root).check_writable()
        with pytest.raises(ConfigError, match="can't be written"), claim(Store(root)):
            pass
        with pytest.raises(ConfigError, match="can't be written"):
            Store(root).fits.get("k", dict)


@pytest.mark.parametrize(("number", "sentence"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "can't be written")])
def test_a_full_or_read_only_disk_is_one_sentence(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(ConfigError, match=sentence), claim(store) as cell:
        cell.commit("sparsity", [ROW])
        with monkeypatch.context() as patch:
            patch.setattr(pd.DataFrame, "to_parquet", refuse)
            patch.setattr(os, "replace", refuse)
            try:
                cell.commit("quality", [ROW])
            except ConfigError as error:
                assert "\n" not in str(error)
                raise
    assert cell.probes() == ["sparsity"]
    assert not list((cell.path / "probes").glob(".draft*"))
    with monkeypatch.context() as patch:
        patch.setattr(store_module.tempfile, "TemporaryFile", refuse)
        with pytest.raises(ConfigError, match=sentence):
            store.check_writable()


def test_a_writable_place_is_left_empty(tmp_path: Path) -> None:
    Store(tmp_path / "new").check_writable()
    assert list((tmp_path / "new").iterdir()) == []
