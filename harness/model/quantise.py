"""A view's weights put into a format of few bits."""

from __future__ import annotations

from harness.errors import ConfigError
from harness.model.formats import GROUPS, Format
from harness.model.view import View


def quantise(view: View, stored: Format) -> None:
    """Give the projections the values of this format, in place, and say so in the view.

    Raises ConfigError, before anything is changed, where the group does not divide a projection's inputs.
    """
    for name, module in view.blocks[0].projections():
        inputs = module.weight.shape[-1]
        if inputs % stored.group:
            fitting = [str(group) for group in GROUPS if inputs % group == 0]
            hint = f"take {' or '.join(fitting)}" if fitting else "it can't be had in groups"
            raise ConfigError(
                f"model.weight_group={stored.group} does not divide the {inputs} inputs of {name} of {view.name}: "
                + hint
            )
    for block in view.blocks:
        for _, module in block.projections():
            weight = module.weight.detach()
            for matrix in weight if weight.dim() == 3 else weight[None]:  # experts, one by one
                matrix.copy_(stored.values(matrix))
    view.stored = stored
    rewriting = f"its weights are {stored.name}, and rewritten ones would no longer be"
    view.limits = {**view.limits, "weights": rewriting}
