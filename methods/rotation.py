"""What methods share that rotate the inputs of a block: the dense function stays, its coordinates change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from harness.execution.changes import Turned, changed
from harness.model.selection import PROJECTIONS
from harness.model.view import View

FAMILIES = ("llama", "qwen2", "qwen3")  # whose norms scale and do nothing else
NORM_OF = {"attn_in": 0, "mlp_in": 1}  # which of a block's norms makes a site's input


def cannot_rotate(view: View) -> str | None:
    """One sentence why the inputs of this model cannot be rotated, or None: behind a norm must be a plain scale."""
    if "weights" in view.limits:
        return f"{view.name} can't be rotated: {view.limits['weights']}"
    if view.family not in FAMILIES or any(
        getattr(norm, "bias", None) is not None for norms in view.norms for norm in norms
    ):
        return f"inputs are rotated behind LLaMA's norms, whose scale folds into the weights, not behind {view.name}'s"
    return None


@contextmanager
def rotated(view: View, bases: Mapping[str, Tensor]) -> Iterator[None]:
    """Rotate the normalised inputs n of sites until the context ends: projections see n Q, on weights W diag(g) Q.

    g is the norm's scale, folded into the weights (SliceGPT's trick, arXiv 2401.15024, section 3), so that what is
    rotated has unit root mean square.

    bases: site (attn_in, mlp_in) -> orthogonal Q float [layers, d_model, d_model]. The rotation happens behind the norm
    here; a deployed model would rotate its residual stream and pay a product of d_model x d_model where two bases meet.
    """
    wide = torch.float64 if view.dtype == torch.float64 else torch.float32
    with ExitStack() as stack:
        for site, all_bases in bases.items():
            for layer, block in enumerate(view.blocks):
                norm: Any = view.norms[layer][NORM_OF[site]]
                basis, scale = all_bases[layer].to(norm.weight.device, wide), norm.weight.data.to(wide)
                for projection in PROJECTIONS[site]:
                    module = getattr(block, projection)
                    if module is not None:
                        weight = ((module.weight.data.to(wide) * scale) @ basis).to(view.dtype)
                        stack.enter_context(replaced_weight(module, weight))
                stack.enter_context(replaced_weight(norm, torch.ones_like(norm.weight.data)))
                stack.enter_context(changed(norm, Turned(basis.to(view.dtype))))
        yield


@contextmanager
def replaced_weight(module: Any, weight: Tensor) -> Iterator[None]:
    """Give a module another weight until the context ends; afterwards it holds the tensor that it held."""
    before = module.weight.data
    module.weight.data = weight
    try:
        yield
    finally:
        module.weight.data = before
