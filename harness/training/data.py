"""What the students read: real passages, windows to score, and batches drawn by (seed, step) alone."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.errors import ConfigError

SCORED_WINDOW = 512  # tokens; the same windows as the perplexity probe's default


def training_text() -> str:
    """Real passages that no task and no perplexity window scores, from all of the pinned sources."""
    from harness.data.text import CALIBRATION_TEXTS, calibration_text

    return "\n\n".join(calibration_text(name) for name in CALIBRATION_TEXTS)


def prepare(model_dir: Path, folder: Path) -> None:
    """Tokenise once: `real.safetensors` (tokens [n]) and `windows.safetensors` (tokens [windows, 512])."""
    if (folder / "windows.safetensors").exists():
        return
    from transformers import AutoTokenizer

    from harness.data.text import evaluation_text, token_windows

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    real = token_windows(tokenizer, training_text(), 1)
    save_file({"tokens": real.flatten().int()}, folder / "real.safetensors")
    windows = token_windows(tokenizer, evaluation_text(), SCORED_WINDOW)
    save_file({"tokens": windows.int()}, folder / "windows.safetensors")


def read_tokens(folder: Path, pattern: str) -> list[Tensor]:
    """The token tensors of every file of `folder` that matches, in the order of their names."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise ConfigError(f"no {pattern} in {folder}: run `python train.py do=[text]` first")
    return [load_file(file)["tokens"] for file in files]


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
