"""Family adapters: the only code that knows transformers internals. One file a family."""

from __future__ import annotations

from typing import Any

from harness.errors import UnsupportedError
from harness.model.families import (
    bamboo,
    falcon,
    gemma,
    gpt_neox,
    llama,
    minicpm,
    moe,
    olmo2,
    opt,
    phi3,
    prosparse,
    qwen,
    smollm3,
)
from harness.model.view import Block, View

__all__ = ["Block", "View", "config_of", "view_of"]

ADAPTERS = (llama, qwen, gemma, phi3, olmo2, smollm3, gpt_neox, falcon, opt, moe)


def config_of(source: str, revision: str | None) -> Any:
    """The config of a folder or hub repository, None where transformers finds it by itself.

    Makes the published architectures known that transformers lacks. Raises OSError where there is no config.
    """
    from transformers import PreTrainedConfig

    prosparse.register()
    bamboo.register()
    minicpm_config = minicpm.register()
    found, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    if "model_type" not in found and minicpm.ARCHITECTURE in found.get("architectures", ()):
        return minicpm_config.from_pretrained(source, revision=revision)  # some MiniCPMs leave their type to their code
    return None


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
    raise UnsupportedError(
        f"no family adapter for model type {model_type!r} (known: {known}); "
        "CONTRIBUTING.md says how to add one, under Add a family"
    )
