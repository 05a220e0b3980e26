"""Family adapters: the only code that knows transformers internals. One file a family, found by its `MODEL_TYPES`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Any

from harness.errors import UnsupportedError
from harness.model.families import bamboo, gemma3n, minicpm, prosparse
from harness.model.view import Block, View

__all__ = ["Block", "View", "adapters", "config_of", "view_of"]


@cache
def adapters() -> Mapping[str, ModuleType]:
    """Model type -> the adapter that knows it: every file of this room with `MODEL_TYPES` and `view(model)`."""
    files = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {kind: file for file in files for kind in getattr(file, "MODEL_TYPES", ())}


def config_of(source: str, revision: str | None) -> Any:
    """The config of a folder or hub repository, None where transformers finds it by itself.

    Makes the published architectures known that transformers lacks. Raises OSError where there is no config.
    """
    from transformers import PreTrainedConfig

    prosparse.register()
    bamboo.register()
    minicpm_config = minicpm.register()
    found, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    if found.get("model_type") == gemma3n.WITH_TOWERS:
        return gemma3n.text_config(source, revision)
    if "model_type" not in found and minicpm.ARCHITECTURE in found.get("architectures", ()):
        return minicpm_config.from_pretrained(source, revision=revision)  # some MiniCPMs leave their type to their code
    return None


def view_of(model: Any, name: str = "model", fingerprint: str = "") -> View:
    """The view of a transformers causal language model. Raises `UnsupportedError` where no adapter knows its type."""
    model_type = model.config.model_type
    if model_type not in adapters():
        raise UnsupportedError(
            f"no family adapter for model type {model_type!r} (known: {', '.join(sorted(adapters()))}); "
            "CONTRIBUTING.md says how to add one, under Add a family"
        )
    view = adapters()[model_type].view(model)
    view.name, view.fingerprint = name, fingerprint
    return view
