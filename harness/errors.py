"""The errors a user can cause. Each carries one clear sentence; a page of the manual explains what it is about."""

import re

PAGES = (  # what a sentence speaks of -> the page of docs/ that explains it; the first that fits
    (r"is no key|names several values|is not an override|is no command|arguments?\b.*--help", "cells.md"),
    (r"probe\.latency|\blatency\b|\bexecution\b", "latency.md"),
    (r"\bscope\b|\bsparsity\b|\bphase\b|dense_prefix", "numbers.md"),
    (r"_target_", "add_a_method.md"),
    (r"\bengine\b|\barchived\b|\bworkers\b|\bSlurm\b|\bRay\b|sbatch", "machines.md"),
    (r"calibration|\bmodel\b|GGUF|\bcache\b|package index|DYNACT_CACHE|^data=", "data.md"),
    (r"\bmethods?\b", "schemes.md"),
    (r"\bclaims?\b|\bstudy\b|\bstages\b|^train\b", "study.md"),
    (
        r"\btasks?\b|\bprobe\b|\boverride\b|experiment|^(dtype|device|size|logger|seed|batch_size)\b"
        r"|\bcells?\b|\bresults\b",
        "cells.md",
    ),
)
# What follows is a list of choices or a reason, which speaks of other things too.
_HEAD = re.compile(r": | must be | has no | can't be | is unknown| names a ")


def page_of(sentence: str) -> str | None:
    """The page of the manual that explains what a sentence speaks of, or None. Its first part says that, as a rule."""
    for part in (_HEAD.split(sentence)[0], sentence):
        for pattern, page in PAGES:
            if re.search(pattern, part):
                return f"docs/{page}"
    return None


def with_page(error: Exception | str) -> str:
    """What the error says, on one line, and where to read more."""
    sentence = " ".join(str(error).split()) or type(error).__name__
    page = page_of(sentence)
    return sentence if page is None else f"{sentence} [see {page}]"


class ConfigError(ValueError):
    """Bad input: the run ends before any model is loaded, with exit code 2."""


class DamagedError(ConfigError):
    """A stored file that is cut short or altered. In a sweep, the cell that needs it fails and the others go on."""


class AssetError(RuntimeError):
    """A pinned model or data file could not be had or does not match its hash."""


class UnsupportedError(RuntimeError):
    """A (model, method) pair that makes no sense: the cell gets a row with status `unsupported`."""


class MeasurementError(RuntimeError):
    """What can't be measured (an item is longer than the model): the cell fails with this sentence."""


class NotANumberError(MeasurementError):
    """A number is NaN: the cell gets the status `invalid`, and no number of it counts."""
