"""The stage `do=[text]`: the model writes its own text in rounds, each a file, so that a stop costs one at most."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from harness.console import say, stdout
from harness.progress import counting
from harness.training.data import save_whole
from harness.training.generate import starts, write
from harness.training.llama import Model

FILE = ".safetensors"


def write_text(
    t: DictConfig, pieces: Iterable[int], model: Model, folder: Path, device: torch.device, deadline: float | None
) -> bool:
    """Let the model write `t.tokens` tokens into each of the pieces own-P-ROUND and heldout-P of `folder`.

    t: the node `text` of conf/training.yaml. What is there is left alone. Returns whether all is there now: no round is
    begun that would end after the deadline (of `time.monotonic`), going by the one before it.
    """
    rounds = max(1, round(t.tokens / (t.batch * t.length)))
    missing = [
        (piece, index)
        for piece in pieces
        for index in range(rounds)
        if not (folder / (f"heldout-{piece}" if index == rounds - 1 else _own(piece, index))).with_suffix(FILE).exists()
    ]
    if not missing:
        return True
    writer = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    given = load_file(folder / "real.safetensors")
    real, separator = given["tokens"], int(given["separator"])
    took, since = 0.0, time.monotonic()
    with counting(len(missing) * (t.length - 1), "writing text") as advance:
        for done, (piece, index) in enumerate(missing):
            began = time.monotonic()
            if deadline is not None and began + took > deadline:
                say(stdout(), f"stopped after {done} of {len(missing)} rounds of text: the same command goes on")
                return False
            seed = piece * 1_000_003 + index
            generator = torch.Generator().manual_seed(seed)
            begun, told = starts(real, t.batch, t.length, t.shortest, t.longest, t.bare, generator, separator)
            warmth = torch.tensor(list(t.temperatures)).repeat(t.batch)[: t.batch].to(device)
            tokens = begun.to(device)
            write(writer, tokens, told.to(device), warmth, seed, device.type == "cuda", advance)
            stream = tokens.to("cpu", torch.int32).flatten()
            heldout = min(t.heldout, len(stream) * rounds // 8, len(stream) // 2) if index == rounds - 1 else 0
            kept = stream[: len(stream) - heldout].clone()
            save_whole({"tokens": kept}, folder / f"{_own(piece, index)}{FILE}")
            if index == rounds - 1:  # last: its being there says that the piece is complete
                save_whole({"tokens": stream[-heldout:].clone()}, folder / f"heldout-{piece}{FILE}")
            took = time.monotonic() - began
    written = len(missing) * t.batch * t.length
    say(stdout(), f"wrote {written:,} tokens at {written / (time.monotonic() - since):,.0f} tokens/s")
    return True


def _own(piece: int, index: int) -> str:
    return f"own-{piece}-{index:02}"
