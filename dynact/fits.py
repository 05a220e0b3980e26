"""What nested methods have learnt from text, kept for the next time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from harness.errors import ConfigError
from harness.execution.method import Method, State
from harness.execution.nest import behaviour
from harness.files import place_errors, write_atomic
from harness.model.view import View


@dataclass(frozen=True, eq=False)
class Fit:
    """The states of nested methods, outermost first, and what they belong to.

    One fit serves every sparsity wherever a method's `fit_fields` leave it out. model: facts of the model that it was
    made on. keys: for each method what its fit depends on.
    """

    model: Mapping[str, Any]
    keys: Sequence[Mapping[str, Any]]
    states: Sequence[State]

    def states_for(self, view: View, methods: Sequence[Method]) -> list[State]:
        """The states, if they were made for this model and these methods; else `ConfigError` says what differs."""
        if self.model != facts_of(view):
            differing = [key for key, value in facts_of(view).items() if self.model.get(key) != value]
            raise ConfigError(f"this fit was made on another model: {', '.join(differing)} differ")
        keys = keys_of(methods)
        if len(keys) != len(self.keys):
            raise ConfigError(f"this fit is of {len(self.keys)} nested methods, not {len(keys)}")
        for theirs, ours in zip(self.keys, keys, strict=True):
            if dict(theirs) != ours:
                differing = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
                raise ConfigError(f"this fit was made for other options of {ours['method']}: {', '.join(differing)}")
        return list(self.states)

    def save(self, path: Path | str) -> None:
        """Write one safetensors file."""
        path = Path(path)
        tensors = {f"{at}.{name}": tensor for at, state in enumerate(self.states) for name, tensor in state.items()}
        told = {"model": json.dumps(self.model), "keys": json.dumps(list(self.keys))}
        with place_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata=told))

    @classmethod
    def load(cls, path: Path | str) -> Fit:
        """Read what `save` wrote. Raises `ConfigError` where that is not what lies there."""
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            model, keys = json.loads(told["model"]), json.loads(told["keys"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(f"{path} holds no saved fit") from error
        states: list[dict[str, Tensor]] = [{} for _ in keys]
        for name, tensor in tensors.items():
            at, _, own = name.partition(".")
            states[int(at)][own] = tensor
        return cls(model, keys, states)


def facts_of(view: View) -> dict[str, Any]:
    """What must be equal for a fit to mean something: the shape of the model, and the size of its first weights."""
    first = view.blocks[0].up.weight
    return {
        "family": view.family,
        "layers": view.n_layers,
        "d_model": view.d_model,
        "d_ff": view.d_ff,
        "heads": view.n_heads,
        "kv_heads": view.n_kv_heads,
        "weights": f"{first.detach().float().norm().item():.4e}",
    }


def keys_of(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """For each nested method what its fit depends on beside model and text, as JSON gives it back."""
    keys = [m.fit_key() | {"outside": behaviour(methods[:at])} for at, m in enumerate(methods)]
    return json.loads(json.dumps(keys, default=str))
