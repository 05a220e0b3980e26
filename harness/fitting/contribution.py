"""What a neuron or a head adds to its sublayer: the truth that predictors learn and are judged by."""

from __future__ import annotations

from torch import Tensor

from harness.model.view import View


class Contributions:
    """Sizes of what the neurons or heads of a view add to the residual stream. Down's column norms are taken once."""

    def __init__(self, view: View) -> None:
        self.n_heads = view.n_heads
        self.norms = [block.down.weight.float().norm(dim=0).to(view.device) for block in view.blocks]

    def of(self, site: str, layer: int, x: Tensor) -> Tensor:
        """float32 [..., n], one for each neuron or head.

        neurons: |x_i| * ||W_down[:, i]||_2, x being the input of down [..., neurons]. heads: the L2 norm of a head's
        output (DejaVu, arXiv 2310.17157, section 4), x being the input of o [..., heads * head_dim].
        """
        if site == "neurons":
            return x.float().abs() * self.norms[layer]
        return x.float().unflatten(-1, (self.n_heads, -1)).norm(dim=-1)
