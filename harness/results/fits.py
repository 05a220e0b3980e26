"""Fits on disk: what a method learnt from calibration text, in `<root>/fits/<key>.safetensors`.

The key is a hash of what the fit depends on, so one fit serves every cell of a sweep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from harness.files import guarded, place_errors, remove_drafts, write_atomic

# torch is loaded when a fit is: whoever only reads rows does without it.
if TYPE_CHECKING:
    from torch import Tensor


class Learnt(dict[str, "Tensor"]):
    """What a method has learnt. tokens: of the text that it learnt from; 0 where its weights or options were enough."""

    def __init__(self, tensors: Mapping[str, Tensor], tokens: int = 0) -> None:
        super().__init__(tensors)
        self.tokens = tokens


class Fits:
    """The fits in `folder`. Nothing is written before the first is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str, make: Callable[[], Mapping[str, Tensor]], tokens: Callable[[], int] = int) -> Learnt:
        """Return the fit stored under `key`, made with `make` if it isn't there or is damaged.

        `key`: from `content_key`. `tokens`: asked after `make`, how much text that looked at. Tensors come back on the
        CPU. A second process asking for the same key waits for the first. Scalars must be 0-d tensors; an empty dict
        is a fit too.
        """
        path = self.folder / f"{key}.safetensors"
        with ExitStack() as stack:
            with place_errors(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(guarded(path.with_suffix(".lock")))
                remove_drafts(self.folder, path.name)
            stored = _load(path)
            if stored is not None:
                return stored
            from safetensors.torch import save

            state = Learnt(owned(make()), tokens())
            with place_errors(path):
                write_atomic(path, save(dict(state), metadata={"digest": _digest(state), "tokens": str(state.tokens)}))
                with open(self.folder / "made.log", "a") as log:
                    log.write(f"{key}\n")
            return state

    def made(self) -> list[str]:
        """Keys of all fits ever made here, in order, a key once for each time that it was made."""
        log = self.folder / "made.log"
        return log.read_text().split() if log.exists() else []


def owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU that share no memory: safetensors refuses views of one storage."""
    import torch

    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _load(path: Path) -> Learnt | None:
    """The stored tensors; None if the file is missing, cut short, altered or from before it said what it took."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
        state = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None
    return Learnt(state, int(told["tokens"])) if "tokens" in told and _digest(state) == told.get("digest") else None


def _digest(state: Mapping[str, Tensor]) -> str:
    from safetensors.torch import save

    return hashlib.sha256(save(dict(sorted(state.items())))).hexdigest()
