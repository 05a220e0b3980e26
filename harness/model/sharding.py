"""Models larger than one GPU: accelerate puts whole blocks on several, one after the other, and moves what passes.

Decisions, fits, counts and logits are made where the first block lies (`View.device`); a step waits for each GPU in
turn, so that this is for quality and sparsity, and nothing is timed. Tensor parallelism is no way for the harness: it
cuts matrices apart between processes, and no method could read a column, a norm or a whole input of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.errors import ConfigError
from harness.model.view import View


def device_map(model: Mapping[str, Any], device: torch.device) -> Any:
    """What transformers is given: accelerate's name of a plan; on a CPU all of it there; None where it is not spread.

    Raises ConfigError for models that are not loaded as they lie.
    """
    name = model.get("device_map")
    if name is None:
        return None
    if model.get("adapter") or model["source"] == "shape":
        raise ConfigError(f"model.device_map spreads stored models; {model['name']} is made on one device")
    return name if device.type == "cuda" else {"": device.type}


def left_out(model: Any) -> bool:
    """Whether accelerate has put parts on a CPU or a disk beside the GPUs, or nowhere yet."""
    places = {parameter.device.type for parameter in model.parameters()}
    return "meta" in places or len(places) > 1


def with_limits(view: View) -> View:
    """The view, which says what it rules out if its blocks lie on several devices."""
    if view.spread:
        view.limits = {
            **view.limits,
            "kernels": f"no kernel runs {view.name}, whose blocks lie on several devices",
            "training": "its blocks lie on several devices, and thresholds are trained on one",
        }
    return view
