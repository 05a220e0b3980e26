"""Scratch: the finished layers of a fit in progress, on disk, so that a killed fit goes on where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from harness.files import place_errors, write_atomic


class Scratch:
    """One folder of safetensors, one file a finished part. Without a folder nothing is kept and every part is made."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def part(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The part called `name` (a file name), read back on the CPU if it was finished before, else made and kept."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            try:
                return load_file(path)
            except (SafetensorError, OSError):
                path.unlink(missing_ok=True)
        part = {key: value.detach().cpu().contiguous() for key, value in make().items()}
        with place_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save(part))
        return part

    def clear(self) -> None:
        """Forget every part: the fit is stored as a whole now."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
