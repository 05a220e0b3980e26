"""The errors a user can cause. Each carries one clear sentence; a page of the manual explains what it is about."""

import re

PAGES = (  # what a sentence speaks of -> the page of docs/ that explains it; the first that fits
    (r"latency|execution", "latency.md"),
    (r"\bscope\b|\bsparsity\b|\bphase\b|dense_prefix", "numbers.md"),
    (r"calibration|\bmodel\b|\bmodel[=.]|GGUF|\bcache\b|package index|DYNACT_CACHE", "data.md"),
    (r"\bmethod\b|\bmethod[=.]", "schemes.md"),
    (r"\btasks?\b|\bprobe\b|\bprobe[=.]|override|experiment|workers", "cells.md"),
)


def page_of(sentence: str) -> str | None:
    """The page of the manual that explains what a sentence speaks of, or None."""
    return next((f"docs/{page}" for pattern, page in PAGES if re.search(pattern, sentence)), None)


def with_page(error: Exception) -> str:
    """What the error says, on one line, and where to read more."""
    sentence = " ".join(str(error).split())
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
    """What a model gives is no number, or an item can't be given to it: the cell fails with this sentence."""
