"""A cell has one owner: who lives keeps it, and who died or was stopped holds nobody up, whatever the clocks say."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.results import lock
from harness.results.lock import LockedError
from harness.results.store import Store
from tests.one_cell import ROW, VERSIONS, claim


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


def test_the_lock_of_a_process_that_died_after_its_cell_was_done_is_removed(store: Store) -> None:
    path = _plant_lock(store, lock.machine(), os.getpid(), age_s=0, started=1.0)  # our number, another process
    store.free("c")
    assert not path.exists()
    with claim(store) as cell:
        store.free("c")
        assert (cell.path / "lock.json").exists(), "its owner lives"


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
