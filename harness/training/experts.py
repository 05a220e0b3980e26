"""LTE's experts: the neurons of each layer in equal groups of similar gate rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.errors import ConfigError
from harness.training.llama import Model


def cluster(model: Model, size: int, seed: int, advance: Callable[[], None] = lambda: None) -> Tensor:
    """Expert of each neuron, [layers, neurons] int64, from balanced k-means on normalised gate rows.

    LTE (2402.06126, section 4.1) with MoEfication's clustering: every expert has exactly `size` neurons.
    """
    from k_means_constrained import KMeansConstrained

    if model.shape.neurons % size:
        raise ConfigError(f"experts of {size} neurons do not divide {model.shape.neurons} neurons")
    labels = []
    for rows in torch.nn.functional.normalize(model.linears["gate"], dim=-1):
        count = model.shape.neurons // size
        fit = KMeansConstrained(count, size_min=size, size_max=size, n_init=1, max_iter=30, random_state=seed)
        labels.append(torch.from_numpy(fit.fit_predict(rows.cpu().numpy())).long())
        advance()
    return torch.stack(labels)


def cached_cluster(
    model: Model, size: int, seed: int, path: Path, advance: Callable[[], None] = lambda: None
) -> Tensor:
    """`cluster`, kept in `path` (safetensors): it takes minutes for a real model and never changes."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"expert_of": cluster(model, size, seed, advance)}, path)
    return load_file(path)["expert_of"]
