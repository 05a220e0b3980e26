"""Who is at work on a cell: a lock file with a heartbeat, that a dead owner's successor may take over."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from harness.errors import ConfigError
from harness.files import guarded, json_bytes, now, read_json, write_atomic

LISTEN = 3  # heartbeats that another machine's owner must miss

OWNER = {"host": str, "pid": int, "since": str}


class LockedError(RuntimeError):
    """Another live process holds the cell, or took it over from this one."""


class Lock:
    """`lock.json` in a cell's folder, kept fresh by a thread.

    A stale lock is judged and replaced under a short kernel lock, so that two processes that find it at
    once can't both take it.
    """

    def __init__(self, folder: Path, heartbeat_s: float, stale_s: float) -> None:
        self.path = folder / "lock.json"
        self._guard = folder / ".guard"
        self._heartbeat_s = heartbeat_s
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        with guarded(self._guard):
            owner = live_owner(self.path, stale_s) or _silent_owner(self.path, LISTEN * heartbeat_s)
            if owner is not None:
                raise LockedError(
                    f"cell {folder.name} is being run by process {owner['pid']} on {owner['host']} "
                    f"since {owner['since']}"
                )
            me = {
                "host": socket.gethostname(),
                "machine": machine(),
                "pid": os.getpid(),
                "process_started": _process_start(os.getpid()),
                "job": _job(),
            }
            write_atomic(self.path, json_bytes(me | {"since": now(), "token": self._token}))
        self._thread = threading.Thread(target=self._beat, name="cell-heartbeat", daemon=True)

    def __enter__(self) -> Lock:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError, ConfigError), guarded(self._guard):
            if self._mine():
                self.path.unlink()

    def check(self) -> None:
        """Raise `LockedError` if another process took the cell over (this one was suspended too long)."""
        if not self._mine():
            raise LockedError(f"cell {self.path.parent.name} was taken over by another process; nothing was written")

    def _mine(self) -> bool:
        return read_json(self.path).get("token") == self._token

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            with contextlib.suppress(OSError):
                if self._mine():
                    os.utime(self.path)


def live_owner(lock: Path, stale_s: float) -> dict[str, Any] | None:
    """The lock's content while its owner lives by all that can be told at a glance, else None.

    A process of this machine is looked at; of any other only the heartbeat is known. Whose it is a host's name does not
    say: containers and clones share names. A heartbeat as far ahead of this machine's clock as it may be behind says
    that one of the two clocks is wrong.
    """
    owner = read_json(lock)
    try:
        age = time.time() - lock.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not owner or _dead(owner) or not all(isinstance(owner.get(key), kind) for key, kind in OWNER.items()):
        return None
    return owner if _here(owner) or abs(age) <= stale_s else None


def _silent_owner(lock: Path, seconds: float) -> dict[str, Any] | None:
    """The content of another machine's lock that looks stale, if it beats while this process listens; else None.

    Clocks of machines differ and jump: a lock is taken over because no heartbeat came while somebody listened.
    """
    owner = read_json(lock)
    if not owner or _dead(owner):
        return None
    with contextlib.suppress(FileNotFoundError):
        before, end = lock.stat().st_mtime_ns, time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(seconds / 20)
            if lock.stat().st_mtime_ns != before:
                return read_json(lock)
    return None


def _here(owner: dict[str, Any]) -> bool:
    return owner.get("machine") == machine()


def _dead(owner: dict[str, Any]) -> bool:
    """Whether it is certain that the owner is no more."""
    if _here(owner):  # start times tell a dead process from another that was given its number
        return _process_start(owner.get("pid", 0)) != owner.get("process_started")
    theirs, mine = owner.get("job"), _job()
    # A batch system never begins a job's next life before the last has ended, and may do it on another machine.
    if not isinstance(theirs, dict) or mine is None or not isinstance(theirs.get("life"), int):
        return False
    return theirs.get("id") == mine["id"] and theirs["life"] < mine["life"]


def _job() -> dict[str, Any] | None:
    """The Slurm job that this process is part of, and how often that was queued again."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    return {"id": f"{cluster} {job}", "life": int(os.environ.get("SLURM_RESTART_COUNT", 0))}


@cache
def machine() -> str:
    """What gives process numbers their meaning: this boot of this machine, and the container's own numbering."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return f"{socket.gethostname()} {uuid.getnode():x}"


def _process_start(pid: int) -> float | None:
    """When a process started; None if there is no such process or only its unreaped remains.

    On Linux in clock ticks since boot, which no change of the clock moves; else in seconds since the epoch.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else float(fields[18])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, ValueError, IndexError):
        return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time(), 1)
    except psutil.Error:
        return None
