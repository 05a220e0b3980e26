"""Family adapters: the only code that knows transformers internals. One file a family."""

from __future__ import annotations

from typing import Any

from harness.errors import UnsupportedError
from harness.families import llama, opt
from harness.families.base import Block, View

__all__ = ["Block", "View", "view_of"]

ADAPTERS = (llama, opt)


def view_of(model: Any, name: str = "model", fingerprint: str = "") -> View:
    """The view of a transformers causal language model.

    Raises `UnsupportedError` where no adapter knows the model type.
    """
    model_type = model.config.model_type
    for adapter in ADAPTERS:
        if model_type in adapter.MODEL_TYPES:
            view = adapter.view(model)
            view.name, view.fingerprint = name, fingerprint
            return view
    known = ", ".join(sorted(t for adapter in ADAPTERS for t in adapter.MODEL_TYPES))
    raise UnsupportedError(f"no family adapter for model type {model_type!r} (known: {known})")
