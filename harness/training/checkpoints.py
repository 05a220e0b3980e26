"""The students: low-rank adapters over a LLaMA or Qwen2, in shards small enough for git, merged on load.

A checkpoint is a folder: `adapter.json` (recipe, hashes), `adapter-0000N-of-0000M.safetensors`, `evaluation.json` (what
was measured of it) and a model card. Factors are int8 with one fp16 step per rank-one row, which keeps rank 64 of a
135M model within 24 MiB and rank 36 of a 0.5B one within 20.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor

from harness.errors import ConfigError, DamagedError
from harness.model.activations import ACTIVATIONS, GateActivation
from harness.reading import read_json, tensors_of
from harness.training.adapter import merge
from harness.training.llama import LINEARS
from harness.training.students import FIGURES, find, known

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 15 * 2**20  # git hosts and reviewers like files under 16 MiB
FORMAT = 1
SHARD = re.compile(r"adapter-\d{5}-of-\d{5}\.safetensors")  # a name, so that no record leads out of its folder
RECORD: dict[str, type | tuple[type, ...]] = {"name": str, "activation": str, "factor": (int, float), "sha256": dict}


@dataclass(frozen=True)
class Checkpoint:
    """What an adapter folder holds. `tensors`: fp32 a.*, b.*, scale.*; threshold [layers]; router, expert_of."""

    name: str
    activation: str
    factor: float
    tensors: dict[str, Tensor]
    record: dict[str, Any]


def quantise(factor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 along `dim`: codes int8 of the same shape and steps fp16 with size 1 in `dim`."""
    step = (factor.abs().amax(dim, keepdim=True) / 127).clamp_min(1e-7).half()
    return (factor / step.float()).round().clamp(-127, 127).to(torch.int8), step


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp32 tensors of a run -> what is stored: factors int8 with steps, scales and routers fp16."""
    packed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        kind = name.split(".")[0]
        if kind in ("a", "b"):
            # one step per rank: a row of `a` [layers, r, in], a column of `b` [layers, out, r]
            packed[name], packed[f"{name}.step"] = quantise(value, -1 if kind == "a" else -2)
        elif name == "expert_of":
            packed[name] = value.to(torch.uint8)
        else:
            packed[name] = value.float() if name == "threshold" else value.half()
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `pack`, up to rounding: fp32 tensors, `expert_of` int64."""
    tensors = {}
    for name, value in packed.items():
        if name.endswith(".step"):
            continue
        if name == "expert_of":
            tensors[name] = value.long()
        else:
            step = packed.get(f"{name}.step")
            tensors[name] = value.float() if step is None else value.float() * step.float()
    return tensors


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write shards and `adapter.json` to `folder`.

    record needs `name`, `activation` and `factor`; the rest (recipe, base fingerprint) is the card's. Figures of what
    lay there before are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("adapter-*.safetensors"):
        stale.unlink()
    (folder / FIGURES).unlink(missing_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in sorted(pack(tensors).items()):
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value.contiguous()
        size += value.nbytes
    hashes = {}
    for index, shard in enumerate(shards, 1):
        path = folder / f"adapter-{index:05d}-of-{len(shards):05d}.safetensors"
        content = save(shard)
        path.write_bytes(content)
        hashes[path.name] = hashlib.sha256(content).hexdigest()
    record = {"format": FORMAT, **record, "sha256": hashes}
    (folder / "adapter.json").write_text(json.dumps(record, indent=1) + "\n")


def read_checkpoint(name_or_dir: str | Path) -> Checkpoint:
    """Read a checkpoint by name or folder, checking every shard's hash. Raises ConfigError with a reason."""
    folder = find(name_or_dir)
    if folder is None:
        raise ConfigError(f"no checkpoint {str(name_or_dir)!r}; there are: {', '.join(known()) or 'none'}")
    record = read_json(folder / "adapter.json")
    if record.get("format") != FORMAT:
        raise ConfigError(f"{folder} has format {record.get('format')}, this version reads format {FORMAT}")
    if lacking := [key for key, kind in RECORD.items() if not isinstance(record.get(key), kind)]:
        raise DamagedError(f"{folder / 'adapter.json'} can't be read: it lacks {', '.join(lacking)}")
    packed: dict[str, Tensor] = {}
    for name, wanted in record["sha256"].items():
        if not SHARD.fullmatch(name):
            raise DamagedError(f"{folder / 'adapter.json'} can't be read: a shard is called {name!r}")
        try:
            content = (folder / name).read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"{folder} lacks its shard {name}") from None
        if hashlib.sha256(content).hexdigest() != wanted:
            raise ConfigError(f"{folder / name} does not have the sha256 that adapter.json names")
        packed |= tensors_of(content, folder / name)
    return Checkpoint(record["name"], record["activation"], record["factor"], unpack(packed), record)


def load_checkpoint(name_or_dir: str | Path, model: PreTrainedModel) -> Checkpoint:
    """Merge a checkpoint into a Hugging Face LLaMA or Qwen2 in place and give it the checkpoint's activation.

    The weights must be those of the base that the checkpoint was trained on. Merging is done in fp32 and
    rounded to the model's dtype once. Routers (LTE) are not attached: the caller's method runs them.
    """
    checkpoint = read_checkpoint(name_or_dir)
    merge_weights(checkpoint, model)
    swap_activation(model, checkpoint.activation, checkpoint.tensors["threshold"])
    return checkpoint


@torch.no_grad()
def merge_weights(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """W <- W (1 + scale) + factor * b a in every linear layer of the decoder blocks, in place. Biases stay."""
    tensors = checkpoint.tensors
    layers = model.model.layers
    if len(layers) != len(tensors["threshold"]):
        raise ConfigError(f"checkpoint {checkpoint.name!r} is not for a model of {len(layers)} layers")
    for i, layer in enumerate(layers):
        for short, path in LINEARS.items():
            weight = layer.get_submodule(path).weight
            a, b, scale = (tensors[f"{kind}.{short}"][i].to(weight.device) for kind in ("a", "b", "scale"))
            if weight.shape != (len(b), a.shape[-1]):
                raise ConfigError(f"checkpoint {checkpoint.name!r} does not fit {path} of layer {i}")
            weight.copy_(merge(weight.float(), scale, a, b, checkpoint.factor))


def swap_activation(model: PreTrainedModel, name: str, thresholds: Tensor) -> None:
    """Put `ACTIVATIONS[name]` in the place of every gated MLP's activation, in place and for good."""
    for layer, threshold in zip(model.model.layers, thresholds, strict=True):
        mlp = layer.mlp
        mlp.act_fn = GateActivation(name, threshold).to(mlp.gate_proj.weight.device)
        if ACTIVATIONS[name].relu_on_up:
            mlp.up_proj.register_forward_hook(lambda _module, _inputs, output: torch.relu(output))
