"""Builds the C++ extension on first use and keeps it in the user's cache."""

import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

_SOURCES = sorted((Path(__file__).parent / "csrc").glob("*"))
_FLAGS = ["-O3"]


def cache_folder() -> Path:
    """$DYNACT_CACHE/kernels, or ~/.cache/dynact/kernels."""
    return Path(os.environ.get("DYNACT_CACHE") or Path.home() / ".cache" / "dynact").expanduser() / "kernels"


@cache
def load_extension() -> bool:
    """Load the extension's operators, building them if the cache has none for these sources and this torch.

    Takes about a minute the first time, milliseconds later. Returns False, after one warning, where it cannot be
    built (no C++ compiler, no ninja): the operators then run through kernels.cpu.fallback.
    """
    try:
        _build_and_load()
    except Exception as error:  # whatever the tool chain does, the pure-torch path is right
        last_line = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        warnings.warn(
            f"The C++ kernels could not be built or loaded ({last_line[0]}). They run through torch's "
            "embedding_bag, about half as fast. They need a C++ compiler and ninja.",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def _build_and_load() -> None:
    digest = hashlib.sha256("\n".join([torch.__version__, sys.version, *_FLAGS]).encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    folder = cache_folder() / digest.hexdigest()[:16]
    complete = folder / "complete"  # a build that was cut off must not look like a library
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if complete.exists():
            torch.ops.load_library(folder / "dynact_cpu.so")
            return
        shutil.rmtree(folder)
        folder.mkdir()
        with _ninja_on_path():
            from torch.utils import cpp_extension  # with setuptools: half a second that only a build needs

            cpp_extension.load(
                name="dynact_cpu",
                sources=[str(s) for s in _SOURCES if s.suffix == ".cpp"],
                extra_cflags=_FLAGS,
                build_directory=str(folder),
                is_python_module=False,
            )
        complete.touch()


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    # pip's ninja sits beside the interpreter, which need not be on the PATH
    path = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([path, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = path
