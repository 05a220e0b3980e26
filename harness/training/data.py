"""What the students read: real passages, own text, windows to score, and batches drawn by (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from harness.errors import ConfigError
from harness.files import write_atomic

SCORED_WINDOW = 512  # tokens; the same windows as the perplexity probe's default


def training_text() -> str:
    """Real passages that no task and no perplexity window scores, from all of the pinned sources."""
    from harness.data.text import CALIBRATION_TEXTS, calibration_text

    return "\n\n".join(calibration_text(name) for name in CALIBRATION_TEXTS)


def separator_of(tokenizer: Any, text: str | None) -> int:
    """The token with which every text of the model's own begins, so that it also lies between texts.

    text: what it stands for; None: <|endoftext|>, else the first token that the tokenizer has a name for. ConfigError
    where the text is not one token.
    """
    if text is not None:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(f"text.separator={text!r} is {len(ids)} tokens of this model, and must be one")
        return int(ids[0])
    known = [tokenizer.get_vocab().get("<|endoftext|>"), tokenizer.bos_token_id, tokenizer.eos_token_id, 0]
    return int(next(token for token in known if token is not None))


def prepare(model_dir: Path, folder: Path, separator: str | None) -> None:
    """Tokenise once: real.safetensors (tokens [n], separator [1]) and windows.safetensors (tokens [windows, 512])."""
    if (folder / "windows.safetensors").exists():
        return
    from transformers import AutoTokenizer

    from harness.data.text import evaluation_text, token_windows

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    real = token_windows(tokenizer, training_text(), 1)
    between = torch.tensor([separator_of(tokenizer, separator)], dtype=torch.int32)
    save_whole({"tokens": real.flatten().int(), "separator": between}, folder / "real.safetensors")
    windows = token_windows(tokenizer, evaluation_text(), SCORED_WINDOW)
    save_whole({"tokens": windows.int()}, folder / "windows.safetensors")


def save_whole(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a file whole or not at all: runs on several GPUs share the folder of texts."""
    write_atomic(path, save(tensors))


def read_tokens(folder: Path, pattern: str) -> list[Tensor]:
    """The token tensors of every file of `folder` that matches, in the order of their names."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise ConfigError(f"no {pattern} in {folder}: run the stage do=[text] first")
    return [load_file(file)["tokens"] for file in files]


def pieces_of(seed: int, count: int) -> range:
    """The pieces of own text that a training seed reads; no other seed reads them."""
    return range(seed * count, (seed + 1) * count)


def read_pieces(folder: Path, pieces: Iterable[int]) -> tuple[Tensor, Tensor]:
    """(what runs train on, what none does) of these pieces of own text, [tokens] each."""
    lacking = [str(piece) for piece in pieces if not (folder / f"heldout-{piece}.safetensors").exists()]
    if lacking:
        raise ConfigError(f"own text {', '.join(lacking)} in {folder} is not complete: run the stage do=[text] first")
    own = [tokens for piece in pieces for tokens in read_tokens(folder, f"own-{piece}-*.safetensors")]
    return torch.cat(own), torch.cat([read_tokens(folder, f"heldout-{piece}.safetensors")[0] for piece in pieces])


class Batches:
    """Windows at random offsets of two token streams; batch `step` depends on (seed, step) alone."""

    def __init__(self, own: Tensor, real: Tensor, real_share: float, batch: int, length: int, seed: int) -> None:
        self.own, self.real = own, real
        self.real_rows = round(real_share * batch)
        self.batch, self.length, self.seed = batch, length, seed
        if min(len(own), len(real)) <= length:
            raise ConfigError(f"the training text is shorter than one window of {length} tokens")

    def at(self, step: int) -> Tensor:
        """Tokens [batch, length] int64, on the device of the streams."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = []
        for stream, count in ((self.own, self.batch - self.real_rows), (self.real, self.real_rows)):
            offsets = torch.randint(len(stream) - self.length, (count,), generator=generator)
            reach = torch.arange(self.length, device=stream.device)
            rows.append(stream[offsets.to(stream.device)[:, None] + reach])
        return torch.cat(rows).long()
