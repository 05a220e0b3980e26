"""Experts: the neurons of an MLP in groups of one size, found by clustering (MoEfication, arXiv 2110.01786).

A split is `expert_of`, int64 [neurons]: the expert of each neuron. Every expert has exactly the same number of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.fitting.calibration import Calibration
from harness.model.selection import TopK, keep_mask
from harness.model.view import Block, View

USED = 0.2  # share of a layer's experts that a token is said to use: those that hold most of its activation
HEAVIEST = 2**20  # METIS takes whole edge weights; larger ones could overflow its sums


def does_not_divide(view: View, size: int) -> str | None:
    """One sentence where experts of `size` neurons leave a rest, or None."""
    if view.d_ff % size == 0:
        return None
    return f"experts of {size} neurons do not divide the {view.d_ff} neurons of a block of {view.name}"


def first_rows(block: Block) -> Tensor:
    """L2-normalised rows float32 [neurons, d_model] of gate, or of up in a plain MLP."""
    first = block.up if block.gate is None else block.gate
    return F.normalize(first.weight.float(), dim=-1)


def by_kmeans(rows: Tensor, size: int, seed: int) -> Tensor:
    """Split by balanced k-means of normalised rows [neurons, d_model]: neurons with like inputs share an expert."""
    from k_means_constrained import KMeansConstrained

    found = KMeansConstrained(len(rows) // size, size_min=size, size_max=size, n_init=1, max_iter=30, random_state=seed)
    return torch.from_numpy(found.fit_predict(rows.cpu().double().numpy())).long()


def by_coactivation(counts: Tensor, size: int, seed: int) -> Tensor:
    """Split by partition of the co-activation graph: neurons that are active together share an expert.

    counts: [neurons, neurons], the number of tokens in which both are active (symmetric; the diagonal is ignored). Weak
    edges go first: those below the lowest decile that is not zero. METIS then cuts as little weight as it can.
    """
    import pymetis

    n = len(counts)
    weights = counts.cpu().double().numpy().copy()
    np.fill_diagonal(weights, 0)
    deciles = np.quantile(weights, np.arange(1, 10) / 10)
    weights[weights < 0.99 * deciles[deciles > 0][:1].sum()] = 0
    weights = np.ceil(weights * min(1.0, HEAVIEST / max(weights.max(), 1.0))).astype(np.int64)
    edges = [np.flatnonzero(row) for row in weights]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in edges])])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about copies of the arrays
        part = pymetis.part_graph(
            n // size,
            adjacency=pymetis.CSRAdjacency(starts, np.concatenate(edges)),
            eweights=np.concatenate([row[at] for row, at in zip(weights, edges, strict=True)]),
            options=pymetis.Options(seed=seed, ufactor=1),
        )
    return evened(torch.tensor(part.vertex_part), size, seed)


def evened(expert_of: Tensor, size: int, seed: int) -> Tensor:
    """The split with surplus neurons, drawn at random, moved to experts that lack some, until all have `size`."""
    expert_of, generator = expert_of.clone(), torch.Generator().manual_seed(seed)
    n_experts = len(expert_of) // size
    surplus, lacking = [], []
    for expert in range(n_experts):
        own = (expert_of == expert).nonzero()[:, 0]
        surplus.append(own[torch.randperm(len(own), generator=generator)][size:])
        lacking += [expert] * (size - len(own))
    expert_of[torch.cat(surplus)] = torch.tensor(lacking, dtype=torch.long)
    return expert_of


def centroids(rows: Tensor, expert_of: Tensor) -> Tensor:
    """Mean of each expert's normalised rows, float32 [experts, d_model]."""
    order = expert_of.to(rows.device).argsort(stable=True)
    return rows[order].unflatten(0, (int(expert_of.max()) + 1, -1)).mean(1)


class Sums:
    """Sums of activation by expert: what an expert holds of a token. The order of neurons is found once."""

    def __init__(self, expert_of: Tensor) -> None:
        self.n_experts = int(expert_of.max()) + 1
        self.order = expert_of.argsort(stable=True)

    def of(self, hidden: Tensor) -> Tensor:
        """float32 [..., experts]: the sum of |a_i| over each expert, a the input of down [..., neurons].

        The paper sums the positive activations of a ReLU; in a gated MLP activations have either sign.
        """
        order = self.order = self.order.to(hidden.device)
        return hidden[..., order].float().abs().unflatten(-1, (self.n_experts, -1)).sum(-1)


def captured(scores: Tensor, sums: Tensor) -> Tensor:
    """Share of the activation that the k experts of highest score hold, for k = 1 ... experts; float32 [experts].

    scores, sums: [tokens, experts]. The mean over tokens.
    """
    held = sums.gather(-1, scores.argsort(-1, descending=True)).cumsum(-1)
    return (held / held[:, -1:].clamp(min=1e-12)).mean(0)


def active(hidden: Tensor, share: float, natural: bool) -> Tensor:
    """Which neurons are active, bool [tokens, neurons]: those of a ReLU that are not zero, else the largest `share`."""
    if natural:
        return hidden != 0
    size = hidden.abs()
    return size >= size.topk(max(1, round(share * size.shape[-1])), dim=-1).values[:, -1:]


def natural_zeros(view: View) -> bool:
    """Whether the activation makes true zeros."""
    return "relu" in view.activation.lower()


@torch.no_grad()
def frequencies(view: View, expert_of: Tensor, batches: Iterable[Tensor]) -> Tensor:
    """How often each expert is used, float32 [layers, experts]: the share of tokens that have it among their best USED.

    expert_of: int64 [layers, neurons]. batches: token windows [batch, length] without padding. An expert's hold on a
    token is the sum of |a_i| over its neurons.
    """
    sums = [Sums(split) for split in expert_of]
    k = max(1, round(USED * sums[0].n_experts))
    counts = torch.zeros(view.n_layers, sums[0].n_experts)
    text = Calibration(view, batches)

    def see(layer: int, x: Tensor) -> None:
        held = sums[layer].of(x.flatten(0, 1))
        counts[layer] += keep_mask(TopK(held, k), held).sum(0).cpu()

    text.visit({"mlp_hidden": see})
    return counts / text.tokens
