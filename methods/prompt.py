"""What methods share that fix their neurons from the prompt."""

from __future__ import annotations

from torch import Tensor

from harness.model.selection import Mask
from harness.model.step import Step


class PromptMasks:
    """The masks that the prompts of the current batch fixed: layer -> bool [batch, 1, neurons].

    In scoring a prompt and the tokens to score come in one forward pass, in generation the prompt comes first and the
    tokens follow one by one: either way the masks are those of the last forward pass that held a prompt.
    """

    def __init__(self) -> None:
        self.keep: dict[int, Tensor] = {}

    def of(self, layer: int, batch: int) -> Mask | None:
        """The masks of a layer, or None (keep everything) where no prompt of this batch was seen."""
        keep = self.keep.get(layer)
        return None if keep is None or len(keep) != batch else Mask(keep)

    def fix(self, layer: int, keep: Tensor, step: Step) -> None:
        """Take bool [batch, neurons] from prompts. A sequence without a prompt token keeps every neuron."""
        self.keep[layer] = (keep | ~step.prompt.any(-1, keepdim=True))[:, None]

    def forget(self, layer: int) -> None:
        """A new sequence has begun."""
        self.keep.pop(layer, None)
