"""Neurons that a copy of gate and up in few bits chooses, as the chained step of a GPU has it done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.errors import UnsupportedError
from harness.model.few_bits import Copy, FewBits
from harness.model.view import View

if TYPE_CHECKING:
    from kernels.cuda.strips import Strips

Guesses = Mapping[int, tuple[Copy, Tensor]]  # layer -> the copy, and the threshold on what it gives (`Method.guesses`)


@dataclass(frozen=True, eq=False)
class Choice:
    """Of one layer. The fields are what `kernels.cuda.choose.choose` takes."""

    codes: Strips
    cut: Tensor
    scales: tuple[Tensor, Tensor]
    t: Tensor
    biases: tuple[Tensor, Tensor] | None


def no_choice(view: View, guesses: Guesses) -> str | None:
    """Why the chained step can't choose by these copies, or None."""
    if set(guesses) != set(range(view.n_layers)):
        return "no copy in few bits chooses the neurons of every layer"
    if any(copy.gate is None or {_bits(copy.gate), _bits(copy.up)} not in ({4}, {8}) for copy, _ in guesses.values()):
        return "the chained step reads copies of gate and up in 4 or 8 bits"
    return None


def choices(view: View, guesses: Guesses) -> list[Choice]:
    """What chooses, by layer. Raises UnsupportedError with what `no_choice` says."""
    reason = no_choice(view, guesses)
    if reason is not None:
        raise UnsupportedError(reason)
    return [_choice(view, *guesses[layer]) for layer in range(view.n_layers)]


def _choice(view: View, copy: Copy, t: Tensor) -> Choice:
    """t: 0-d or [neurons]."""
    from kernels.cuda.strips import joined, pack_codes

    gate, up = copy.gate, copy.up
    bits = _bits(up)
    assert gate is not None and bits is not None
    given = (copy.gate_bias, copy.up_bias)
    biases = [torch.zeros(view.d_ff, dtype=view.dtype, device=view.device) if b is None else b for b in given]
    return Choice(
        joined([pack_codes(_multiples(weight).t(), bits) for weight in (gate, up)]),
        # as torch's hardshrink has it, and the kernels of kernels/few_bits.py
        torch.tensor([copy.cut], dtype=view.dtype, device=view.device).float(),
        (gate.scale.to(view.device), up.scale.to(view.device)),
        t.to(view.device, view.dtype).float().expand(view.d_ff).contiguous(),
        None if given == (None, None) else (biases[0].to(view.dtype), biases[1].to(view.dtype)),
    )


def _bits(weight: FewBits) -> int | None:
    return None if weight.codes is None else weight.codes.bits


def _multiples(weight: FewBits) -> Tensor:
    """The whole numbers that its values are of its scales, int64 [n, d]: up to 127, so that 16 bits tell them apart."""
    return (weight.values.float() / weight.scale.to(weight.values.device)[:, None]).round().long()
