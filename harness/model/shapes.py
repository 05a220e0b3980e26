"""Models of a published shape with random weights: their latency and memory are the real ones', nothing else is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from harness.model import memory


def key(model: Mapping[str, Any]) -> str:
    """What a fit on such a model belongs to."""
    return "shape:" + hashlib.sha256(json.dumps(model["shape"], sort_keys=True).encode()).hexdigest()


def random_model(model: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """The model, every matrix normal with deviation 0.02, norms one and biases zero. Seeded.

    model: an entry of conf/model with `shape`: the keys of transformers' config, `model_type` among them. Raises
    ConfigError where the device has too little memory.
    """
    from transformers import AutoConfig

    from harness.model.families.unfilled import unfilled

    shape = dict(model["shape"])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    memory.check(model["name"], memory.need(config, dtype, 1), device)
    made = unfilled(config, dtype, device)
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return made.eval().requires_grad_(False)
