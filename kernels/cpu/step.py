"""One token of one sequence through a whole Llama-like model in C++ (csrc/step.cpp), on tensors that others own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.cpu.build import load_extension
from kernels.lowbit import Packed

# What a layer's stages do, in order. A selection must be set before the stage that uses it.
STAGES = ("norm", "attention", "o", "mlp_norm", "gate", "up", "down")
BEFORE = {"attn_in": 1, "heads": 1, "attn_out": 2, "mlp_in": 4, "neurons": 4, "gate": 5, "mlp_hidden": 6}


class Step:
    """The model as the kernels see it: projections, norms, a static cache, and what each projection skips.

    Every value that the Hugging Face module would store as a tensor is rounded to the model's type once. Projections
    lie by columns (W^T [K, N]: input channels can be skipped), by rows (W [N, K]: outputs can), or packed as lines.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        groups: int,
        head_dim: int,
        neurons: int,
        act: str,
        dtype: torch.dtype,
        scale: float,
    ) -> None:
        """dtype: fp32 or bf16. act: a name of kernels.reference.ACTIVATIONS. Raises RuntimeError without extension."""
        if not load_extension():
            raise RuntimeError("the C++ kernels are not available on this machine")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the fused step runs in float32 or bfloat16, not {dtype}")
        sizes = [layers, heads, groups, head_dim, neurons]
        self.own: Any = torch.classes.dynact_cpu.Step(sizes, act, dtype == torch.bfloat16, scale)
        self.layers = layers

    def norms(self, layer: int, first: Tensor, first_eps: float, second: Tensor, second_eps: float) -> None:
        """Weights [d_model] of the norms before attention and before the MLP."""
        self.own.set_norms(layer, first, first_eps, second, second_eps)

    def final_norm(self, weight: Tensor, eps: float) -> None:
        """Weight [d_model] of the norm before the head."""
        self.own.set_final_norm(weight, eps)

    def weight(self, layer: int, name: str, weight: Tensor, columns: bool, bias: Tensor | None = None) -> None:
        """A projection, or the head (any layer): W [N, K], or W^T [K, N] where columns. Contiguous, of the dtype."""
        self.own.set_weight(layer, name, weight, columns, bias)

    def packed(self, layer: int, name: str, weight: Packed, columns: bool, bias: Tensor | None = None) -> None:
        """A projection in low bits: its lines are input channels where columns, else outputs."""
        self.own.set_packed(layer, name, weight.codes, weight.peaks, weight.bits, weight.width, columns, bias)

    def turn(self, layer: int, site: str, basis: Tensor) -> None:
        """What the norm before a site ("attn_in" or "mlp_in") gives becomes x Q, Q being basis [d_model, d_model]."""
        self.own.set_weight(layer, site, basis.contiguous(), True, None)

    def centre(self, layer: int, name: str, c: float) -> None:
        """A projection reads x - c, and selects from that. No lists of outputs then."""
        self.own.set_centre(layer, name, c)

    def low_rank(self, layer: int, name: str, out: Tensor, into: Tensor) -> None:
        """A projection gives L x as well, of all of x: L = out [N, r] into [r, K]. No lists of outputs then."""
        self.own.set_low_rank(layer, name, into.contiguous(), out.t().contiguous())

    def limit(self, layer: int, name: str, t: Tensor | float | None) -> None:
        """Keep channel i of a projection where |x_i| > t_i; of "neurons": neuron i where |act(gate)_i| > t_i."""
        self.own.set_limit(layer, name, None if t is None else torch.as_tensor(t, dtype=torch.float32))

    def top(self, layer: int, name: str, k: int, worth: Tensor | None = None) -> None:
        """Keep the k channels of a projection of largest |x|, or |x| * worth (fp32 [K]); of equal ones the first."""
        self.own.set_top(layer, name, k, worth)

    def index(self, layer: int, name: str, idx: Tensor | None) -> None:
        """Keep the listed channels of a projection, or the listed "neurons" or "heads" of a layer. int [m], unique."""
        self.own.set_index(layer, name, idx)

    def guess(
        self,
        layer: int,
        copies: Sequence[Packed],
        scales: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        cut: float,
        t: Tensor,
    ) -> None:
        """Neuron i runs where |up x * act(gate x)|_i > t_i by copies, of the inputs with |x| > cut. Nobody is asked.

        copies: gate's and up's integers by input channel, of equal bits; scales (fp32) and biases of their outputs
        [neurons]. t: 0-d or [neurons]. What the MLP itself computes is activated in the same way.
        """
        gate, up = copies
        if gate.bits != up.bits:
            raise ValueError(f"gate and up of a guess have {gate.bits} and {up.bits} bits")
        codes, peaks = [gate.codes, up.codes], [gate.peaks, up.peaks]
        self.own.set_guess(layer, codes, peaks, gate.bits, list(scales), list(biases), cut, t.float())

    def activation(self, layer: int, cut: float, relu_on_up: bool) -> None:
        """A ReLU that keeps what is above `cut`; whether up passes a ReLU too."""
        self.own.set_cut(layer, cut, relu_on_up)

    def rotary(self, cos: Tensor, sin: Tensor) -> None:
        """Of every position: [positions, head_dim]."""
        self.own.set_rotary(cos, sin)

    def cache(self, keys: Sequence[Tensor], values: Sequence[Tensor], lengths: Sequence[Tensor]) -> None:
        """By layer keys, values [1, G, S, D], contiguous, and how many are filled (int64, 0-d), counted up here."""
        self.own.set_cache(list(keys), list(values), list(lengths))

    def help(self, asked: bool | None) -> None:
        """Whether other threads help, up to torch's number: None by what was faster so far. Results are the same."""
        self.own.set_help(asked)

    @property
    def helped(self) -> bool:
        """Whether they help at the moment."""
        return self.own.helped()

    def begin(self, row: Tensor) -> None:
        """The residual stream is `row` [d_model]: the token's embedding, or what a layer is shown."""
        self.own.begin(row)

    def run(self, first: int, last: int) -> None:
        """Stages first to last; layer l's begin at l * len(STAGES), the final norm and the head come after."""
        self.own.run(first, last)

    @property
    def stages(self) -> int:
        """How many there are, head included."""
        return self.own.stages()

    def buffer(self, name: str) -> Tensor:
        """The live "residual", "normed", "attended", "gate" (activated), "hidden", fp32 [n]; new "logits" [1, 1, V]."""
        return self.own.buffer(name)
