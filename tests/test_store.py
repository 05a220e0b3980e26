"""Cells survive whatever happens to the process that writes them; nothing is ever mixed or half there."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import ConfigError, NotANumberError, UnsupportedError
from harness.results import lock
from harness.results import store as store_module
from harness.results.cells import SchemaError
from harness.results.identity import cell_id, content_key
from harness.results.lock import LockedError
from harness.results.rows import COLUMNS
from harness.results.store import Store

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"model": {"name": "tiny"}, "method": {"name": "teal"}, "sparsity": 0.4, "seed": 0}
VERSIONS = {"method": 1}
ROW = {"metric": "acc", "value": 0.5, "n": 10, "unit": "share", "task": "piqa"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def claim(store: Store, name: str = "c", versions: dict | None = None):
    return store.claim(name, CONFIG, VERSIONS if versions is None else versions, identity={"model": "tiny"})


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


# ---- locks


def test_a_live_lock_is_refused_by_name(store: Store) -> None:
    with claim(store), pytest.raises(LockedError, match=str(os.getpid())), claim(store):
        pass
    with claim(store):  # freed on leaving
        pass


def _plant_lock(store: Store, machine: str, pid: int, age_s: float, started: float = 0.0) -> Path:
    path = store.root / "cells/c/lock.json"
    path.parent.mkdir(parents=True)
    host = socket.gethostname()  # as containers and clones share it
    owner = {"host": host, "machine": machine, "pid": pid, "process_started": started, "since": "then", "token": "x"}
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_locks_of_the_dead_and_the_silent_are_reclaimed(store: Store) -> None:
    path = _plant_lock(store, lock.machine(), os.getpid(), age_s=0)
    assert store.state("c", VERSIONS) == "run"  # our number, but another process: the number was reused
    with claim(store):
        assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("age_s", "state"), [(10, "locked"), (400, "run")])
def test_a_lock_of_another_machine_of_our_name_lives_by_its_heartbeat(store: Store, age_s: int, state: str) -> None:
    _plant_lock(store, "another boot pid:[1]", 2**22, age_s)  # no such process here, which says nothing
    assert store.state("c", VERSIONS) == state


def test_a_live_process_of_this_machine_keeps_its_lock_whatever_the_clock_says(store: Store) -> None:
    with claim(store) as cell:
        os.utime(cell.path / "lock.json", (time.time() - 3600,) * 2)
        assert store.state("c", VERSIONS) == "locked"


def test_what_identifies_this_machine_is_this_boot_and_this_container() -> None:
    boot = Path("/proc/sys/kernel/random/boot_id")
    if not boot.exists():
        pytest.skip("no Linux")
    assert lock.machine() == f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def test_a_process_is_dated_by_a_clock_that_nobody_can_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = lock._process_start(os.getpid())
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert lock._process_start(os.getpid()) == before is not None
    assert lock._process_start(2**22 + 1) is None


def test_the_heartbeat_keeps_a_lock_fresh(tmp_path: Path) -> None:
    store = Store(tmp_path, heartbeat_s=0.02)
    with claim(store):
        held = tmp_path / "cells/c/lock.json"
        os.utime(held, (0, 0))
        deadline = time.monotonic() + 20
        while held.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held.stat().st_mtime > 0


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


def test_whoever_lost_the_lock_can_write_nothing(store: Store) -> None:
    with pytest.raises(LockedError), claim(store) as cell:
        held = cell.path / "lock.json"
        held.write_text(json.dumps(json.loads(held.read_text()) | {"token": "other"}))
        cell.commit("quality", [ROW])
    assert held.exists() and cell.probes() == []
    assert cell.status["status"] == "running"


def test_one_of_many_claimants_wins(store: Store) -> None:
    start, release, won = threading.Barrier(8), threading.Event(), []
    lost = threading.Semaphore(0)

    def contend() -> None:
        start.wait()
        try:
            with claim(store):
                won.append(1)
                release.wait(30)
        except LockedError:
            lost.release()

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert all(lost.acquire(timeout=30) for _ in range(7))
    release.set()
    for thread in threads:
        thread.join()
    assert won == [1]


# ---- clocks, other machines, file systems


def _beating(path: Path, at: float) -> tuple[threading.Event, threading.Thread]:
    """The heartbeat of an owner elsewhere, whose clock says `at` (seconds from ours)."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.005):
            os.utime(path, (time.time() + at,) * 2)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    return stop, thread


@pytest.mark.parametrize("jump_s", [-3600, 3600], ids=["an hour ahead of theirs", "an hour behind theirs"])
def test_a_clock_that_jumps_takes_no_cell_from_a_live_owner(tmp_path: Path, jump_s: int) -> None:
    store = Store(tmp_path, heartbeat_s=0.1)
    path = _plant_lock(store, "another boot pid:[1]", 2**22, -jump_s)
    stop, thread = _beating(path, jump_s)
    with pytest.raises(LockedError, match=str(2**22)), claim(store):
        pass
    stop.set()
    thread.join()
    with claim(store) as cell:  # nobody beats: it is dead, whatever the clocks say
        assert json.loads((cell.path / "lock.json").read_text())["pid"] == os.getpid()


def test_a_jump_of_our_own_clock_does_not_lose_our_own_cell(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    with claim(store) as cell:
        for jump in (3600, -7200):
            monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
            assert store.state("c", VERSIONS) == "locked"
            cell.commit("quality", [ROW])
        cell.finish()
    assert store.state("c", VERSIONS) == "skip"


@pytest.mark.parametrize(
    ("theirs", "life", "state"),
    [("tiny 7", 0, "run"), ("tiny 7", 1, "locked"), ("tiny 8", 0, "locked"), (None, 0, "locked")],
    ids=["our job's last life", "our job's other task", "another job", "no job"],
)
def test_a_job_that_is_queued_again_knows_that_its_last_life_is_over(
    store: Store, monkeypatch: pytest.MonkeyPatch, theirs: str | None, life: int, state: str
) -> None:
    path = _plant_lock(store, "another boot pid:[1]", 2**22, age_s=10)
    job = {"id": theirs, "life": life} if theirs else None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"job": job}))
    os.utime(path)
    for name, value in (("JOB_ID", "7"), ("CLUSTER_NAME", "tiny"), ("RESTART_COUNT", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert store.state("c", VERSIONS) == state


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_sentence(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    for use in (lambda: claim(store).__enter__(), lambda: store.fits.get("k", dict)):
        with pytest.raises(ConfigError, match="has no locks") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not list(store.root.rglob("*.json")), "no cell is begun that two could do"


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


def test_the_lock_of_a_process_that_died_after_its_cell_was_done_is_removed(store: Store) -> None:
    path = _plant_lock(store, lock.machine(), os.getpid(), age_s=0, started=1.0)  # our number, another process
    store.free("c")
    assert not path.exists()
    with claim(store) as cell:
        store.free("c")
        assert (cell.path / "lock.json").exists(), "its owner lives"


HOLDER = """
import sys, time
from harness.results.store import Store
def make():
    print("making", flush=True)
    time.sleep(600)
Store(sys.argv[1]).fits.get("k", make)
"""


def test_a_process_that_dies_while_it_makes_a_fit_holds_nobody_up(store: Store) -> None:
    command = [sys.executable, "-c", HOLDER, str(store.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"making\n"
        holder.kill()
    assert store.fits.get("k", lambda: {"w": torch.ones(1)})["w"] == 1
    assert store.fits.made() == ["k"]


# ---- killed

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


# ---- fits


def test_a_fit_is_made_once_and_read_back(store: Store) -> None:
    state = {"w": torch.randn(3, 4), "n": torch.tensor(7), "h": torch.ones(2, dtype=torch.bfloat16)}
    first = store.fits.get("k", lambda: state)
    again = Store(store.root).fits.get("k", lambda: pytest.fail("made twice"))
    assert store.fits.made() == ["k"]
    for name, tensor in state.items():
        assert torch.equal(first[name], tensor) and torch.equal(again[name], tensor)
        assert again[name].dtype == tensor.dtype
    assert store.fits.get("nothing", dict) == {} == store.fits.get("nothing", lambda: pytest.fail("made twice"))


@pytest.mark.parametrize("damage", ["cut", "altered", "emptied"])
def test_a_damaged_fit_is_made_again(store: Store, damage: str) -> None:
    store.fits.get("k", lambda: {"w": torch.zeros(100)})
    path = store.root / "fits/k.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-50]
    elif damage == "altered":
        content[-1] ^= 1
    else:
        content.clear()
    path.write_bytes(content)
    assert torch.equal(store.fits.get("k", lambda: {"w": torch.ones(100)})["w"], torch.ones(100))
    assert store.fits.made() == ["k", "k"]


def test_threads_that_want_one_fit_wait_for_it(store: Store) -> None:
    def make() -> dict[str, torch.Tensor]:
        time.sleep(0.1)
        return {"w": torch.ones(1)}

    threads = [threading.Thread(target=store.fits.get, args=("k", make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.fits.made() == ["k"]


def test_a_fit_that_fails_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError):
        store.fits.get("k", lambda: 1 / 0)
    assert store.fits.made() == []
    assert not list(store.root.glob("fits/*.safetensors"))


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
