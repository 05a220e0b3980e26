"""Neurons chosen on the device by a copy of gate and up in few bits: their list and their number (csrc/choose.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cuda import nvrtc
from kernels.cuda.common import act_code, cdiv
from kernels.cuda.packed import columns, splits
from kernels.cuda.strips import Strips

WARPS = 8


class Chosen:
    """What is chosen among n neurons, and what the launches that choose hand to one another; one serves all layers.

    idx: int32 [n], ascending, of which the first `count` (int32, 0-d) hold.
    """

    def __init__(self, codes: Strips, n: int, device: torch.device) -> None:
        """codes: of gate and up side by side, [d_model, 2 n and padding]."""
        self.sums = torch.zeros(splits(codes, sparse=True), codes.width, device=device)
        self.idx, self.words = (torch.zeros(size, dtype=torch.int32, device=device) for size in (n, cdiv(n, 32)))
        self.count, self.arrived = (torch.zeros((), dtype=torch.int32, device=device) for _ in range(2))


def choose(
    x: Tensor,
    codes: Strips,
    cut: Tensor,
    scales: tuple[Tensor, Tensor],
    t: Tensor,
    chosen: Chosen,
    *,
    act: str,
    biases: tuple[Tensor, Tensor] | None = None,
    early: int = 0,
) -> Chosen:
    """List the neurons whose |up x * act(gate x)| by the copy is not at most t; returns `chosen`. Two launches.

    x: 16-bit [d_model], of which what is above the cut (fp32 [1]) in magnitude is read. codes: gate and up side by
    side, as `strips.pack_codes` and `strips.joined` have them. scales: of gate and up, fp32 [n]; biases: 16-bit [n]. t:
    fp32 [n]. Every sum has a fixed order, so that what is chosen does not change from one run to the next.
    """
    columns(x, codes, cut, y=chosen.sums, partials=True, early=early, half=x.dtype)
    n = len(chosen.idx)
    macros = {
        "BF16": x.dtype == torch.bfloat16, "X32": 0, "ACT": act_code(act), "HAS_UP": 0, "PDL": min(1, early),
        "WARPS": WARPS, "BIAS": biases is not None,
    }  # fmt: skip
    nvrtc.launch(
        nvrtc.kernel(x.device.index or 0, "choose", **macros), (cdiv(n, 32 * WARPS), 1), 32 * WARPS,
        [
            chosen.sums, *scales, *(biases or (None, None)), t, chosen.words, chosen.arrived, chosen.idx, chosen.count,
            n, len(chosen.sums), codes.width, len(codes.codes) // 2 * codes.outputs,
        ],
        early=early > 0,
    )  # fmt: skip
    return chosen
