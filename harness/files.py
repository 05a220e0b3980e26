"""Writing files so that nobody ever sees half of one, and saying in one sentence where they can't be written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from harness import reading
from harness.errors import ConfigError, DamagedError

# Errors of the place we write to. They are the user's to mend, so they end as one sentence.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, even after a power cut; the old one stays until then."""
    draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")  # not mkstemp: others may read it
    try:
        draft.write_bytes(content)
        sync(draft)
        os.replace(draft, path)
        sync(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def remove_drafts(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of files that they were writing here. The caller holds what guards them."""
    for draft in folder.glob(f".{name}-{'[0-9a-f]' * 32}"):
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Hold the kernel's lock on a file, which is made if need be and stays: freed however this process ends.

    Raises `ConfigError` where the file system has no locks. Without them two processes could both take a cell.
    """
    guard = FileLock(path, fallback_to_soft=False)
    try:
        guard.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in _NO_LOCKS:
            raise ConfigError(
                f"results can't be stored in {path.parent}: its file system has no locks (flock), without which two "
                "processes could do one cell"
            ) from error
        raise
    try:
        yield
    finally:
        guard.release()


def sync(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk itself before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that can't say so for a folder
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def place_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a folder that can't be written into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            problem = "the disk is full"
        elif error.errno in _CLOSED:
            problem = f"it can't be written ({os.strerror(error.errno)})"
        else:
            raise
        raise ConfigError(f"results can't be stored in {path}: {problem}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is none, or only part of one."""
    try:
        return reading.read_json(path)
    except DamagedError:
        return {}


def json_bytes(value: Any) -> bytes:
    """Indented JSON with a last newline; what JSON has no type for is written as text."""
    return (json.dumps(value, indent=2, default=str) + "\n").encode()


def now() -> str:
    """The time in UTC, to the second: 2026-01-31T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
