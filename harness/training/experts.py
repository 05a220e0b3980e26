"""LTE's experts: the neurons of each layer in equal groups of similar gate rows, and where their routers start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.errors import ConfigError
from harness.training.llama import Model

GAIN = 4.0  # of a router's first logits, so that most scores start near 0 or 1
RIDGE = 1e-2  # share of the inputs' mean square
BAND = 0.05  # of the share of chosen experts, over which the efficiency loss sets in


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


def first_router(inputs: Tensor, hidden: Tensor, down: Tensor, expert_of: Tensor) -> Tensor:
    """A router that tells apart, as far as a linear one can, the half of the experts of largest output.

    inputs: [tokens, width], of the MLP; hidden: [tokens, neurons]; down: [width, neurons]; expert_of: [neurons].
    Returns [experts, width] fp32: ridge regression of +1 (this token's larger half) and -1 on the inputs, times
    GAIN. The paper starts at random; a router must then first learn which scores to leave near one half, and
    separability holds many where chance put them.
    """
    energy = (hidden.float() * down.float().norm(dim=0)).square()
    outputs = energy.new_zeros(len(energy), int(expert_of.max()) + 1).index_add_(1, expert_of, energy)
    wanted = (outputs > outputs.median(dim=1, keepdim=True).values).double() * 2 - 1
    x = inputs.double()
    gram = x.T @ x
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return GAIN * torch.linalg.solve(gram + ridge, x.T @ wanted).T.float()


def efficiency_weight(weight: float, chosen: Tensor, budget: float) -> Tensor:
    """The weight of LTE's efficiency loss: full from BAND over the `budget`, falling to none at it.

    chosen: 0-d, share of experts chosen; the device is not synchronised. The paper has a constant weight and takes
    whatever sparsity comes of it; with budget 0 so does this, down to a share of BAND.
    """
    return weight * ((chosen - budget) / BAND).clamp(0.0, 1.0)
