"""The test matrix: every method, one row each, with settings small enough for tiny random models.

Each row builds the method at a requested sparsity; `tolerance` says how far achieved may be from requested on a tiny
model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from harness.execution.method import Method, State
from harness.fitting.calibration import Calibration
from harness.model.view import View
from methods.attribution import Attribution
from methods.cats import Cats
from methods.cett import Cett
from methods.chess import Chess
from methods.combined import Combined
from methods.dejavu import DejaVu
from methods.dense import Dense
from methods.dense_slice import DenseSlice
from methods.drelu import DRelu
from methods.expert_prune import ExpertPrune
from methods.fatrelu import FatRelu
from methods.griffin import Griffin
from methods.kv_skip import KvSkip
from methods.larosa import LaRoSA
from methods.lte import Lte
from methods.meangate import MeanGate
from methods.moefication import MoEfication
from methods.oracle import Oracle
from methods.polar import Polar
from methods.prosparse import ProSparse
from methods.prox import Dip, Prox
from methods.random import Random
from methods.relu import Relu
from methods.relu2 import Relu2
from methods.relu_stage2 import ReluStage2
from methods.rsparse import RSparse
from methods.scap import Scap
from methods.sirius import Sirius
from methods.skip_softmax import SkipSoftmax
from methods.spon import Spon
from methods.statistical_topk import StatisticalTopK
from methods.tda import Tda
from methods.teal import Teal
from methods.topp import MaxP, TopK, TopP
from methods.wina import Wina

# Every case meets every invariant on FIRST, the REPRESENTATIVE ones do on UNLIKE, families built in ways of their own.
# Whatever is left is attached, run, counted and detached once, on every family of tests/tiny.py (test_families_matrix).
FIRST = ("llama", "mistral", "opt")
UNLIKE = ("qwen3", "gemma2", "phi3", "olmo2", "gpt_neox", "falcon", "mixtral", "gemma3n")
REPRESENTATIVE = ("teal", "cats", "dejavu", "griffin", "kv_skip", "cett", "random", "relu")


@dataclass(frozen=True)
class RandomRouters(Lte):
    """LTE with random routers over 16 experts of 8 neurons, for any model."""

    checkpoint: str | None = "random"

    def unsupported(self, view: View) -> str | None:
        return None

    def fit(self, view: View, calibration: Calibration) -> State:
        generator = torch.Generator().manual_seed(0)
        router = torch.randn(view.n_layers, 16, view.d_model, generator=generator)
        return {"router": router, "expert_of": torch.arange(view.d_ff).remainder(16).repeat(view.n_layers, 1)}


@dataclass(frozen=True)
class RandomConstants(Spon):
    """SPON alone, with constants that are drawn: what it learns depends on the methods beside it."""

    def fit(self, view: View, calibration: Calibration) -> State:
        generator = torch.Generator().manual_seed(0)
        widths = {name: module.out_features for name, module in view.blocks[0].projections()}
        return {name: torch.randn(view.n_layers, n, generator=generator) for name, n in widths.items()}


@dataclass(frozen=True)
class CorrectedTeal(Teal):
    """TEAL inside of Sirius: alone Sirius leaves the model as it is."""

    phases: ClassVar[tuple[str, ...]] = ("decode",)

    def unsupported(self, view: View) -> str | None:
        return Sirius().unsupported(view)

    def rewrite(self, view: View, state: State) -> AbstractContextManager[Any]:
        return Sirius(self.sparsity, kernel_size=4).rewrite(view, state)


@dataclass(frozen=True)
class Case:
    """One row. site: where achieved is compared with requested (a site, "mlp" or "model"), None = not compared.

    families: those of FIRST that it must run on.
    """

    make: Callable[[float], Method]
    site: str | None = "model"
    tolerance: float = 0.02
    families: tuple[str, ...] = FIRST
    dense_at_zero: bool = True  # sparsity 0 is the dense model (an activation swap is another model)


GATED = ("llama", "mistral")
# Half of a random gate is negative: at 0.5 a swap's natural zeros are what was asked for.
SWAP = {"site": "neurons", "tolerance": 0.06, "families": GATED, "dense_at_zero": False}

CASES: dict[str, Case] = {
    "dense": Case(lambda s: Dense(), site=None),
    "random": Case(lambda s: Random(s), families=("llama", "mistral")),
    "oracle": Case(lambda s: Oracle(s), tolerance=0.04),
    "oracle_token": Case(lambda s: Oracle(s, budget="token")),
    "dense_slice": Case(lambda s: DenseSlice(s), families=("llama", "mistral")),
    "teal": Case(lambda s: Teal(s), tolerance=0.04),
    "teal_greedy": Case(lambda s: Teal(s, allocation="greedy", base_step=0.2, greedy_tokens=128), tolerance=0.04),
    "dejavu": Case(lambda s: DejaVu(s, rank=8, epochs=2), site="neurons"),
    "dejavu_lookahead": Case(lambda s: DejaVu(s, targets="mlp", predictor="lookahead", rank=8), site="neurons"),
    "dejavu_heads": Case(lambda s: DejaVu(s, targets="heads", predictor="lookahead", rank=2, epochs=2), site="heads"),
    "dejavu_score": Case(lambda s: DejaVu(s, select_by="score", rank=8, epochs=2), site="neurons", tolerance=0.15),
    "dejavu_oracle": Case(lambda s: DejaVu(s, predictor="oracle"), site="heads"),
    "dejavu_random": Case(lambda s: DejaVu(s, predictor="random"), site="heads"),
    "cett": Case(lambda s: Cett(s), site="mlp_hidden", tolerance=0.05),
    "cett_budget": Case(lambda s: Cett(s, cett=0.2 if s else None, cett_tokens=128), site=None),
    "cats": Case(lambda s: Cats(s), site="neurons", tolerance=0.05, families=("llama", "mistral")),
    "griffin": Case(lambda s: Griffin(s), site="neurons"),
    "tda": Case(lambda s: Tda(s), site="neurons", tolerance=0.1),
    "kv_skip_norm": Case(lambda s: KvSkip(s, unit="group"), site="heads"),
    "kv_skip": Case(lambda s: KvSkip(s, select_by="serial", unit="group", rank=2, epochs=1), site="heads"),
    "kv_skip_zeros": Case(lambda s: KvSkip(s, select_by="random", unit="group", dropped="zeros"), site="heads"),
    "kv_recompute": Case(
        lambda s: KvSkip(s, select_by="lookahead", unit="group", kv="recompute", rank=2), site="heads"
    ),
    "kv_mask_output": Case(lambda s: KvSkip(s, select_by="random", kv="mask_output"), site="heads"),
    "polar": Case(lambda s: Polar(s, dense_layers=0, epochs=1), site="heads"),
    "polar_norm": Case(lambda s: Polar(s, select_by="norm"), site=None),
    "skip_softmax": Case(lambda s: SkipSoftmax(s, block=4, tile=4), site=None),
    "lte": Case(lambda s: RandomRouters(s), site=None),
    "relu": Case(lambda s: Relu(s), **SWAP),
    "relu2": Case(lambda s: Relu2(s), **SWAP),
    "fatrelu": Case(lambda s: FatRelu(s, threshold=0.01), **SWAP),
    "prosparse": Case(lambda s: ProSparse(s, threshold=0.01), **SWAP),
    "drelu": Case(lambda s: DRelu(s), **SWAP),
    "relu_stage2": Case(lambda s: ReluStage2(s), **SWAP),
    "moefication": Case(lambda s: MoEfication(s, expert_size=8, epochs=2), site="neurons"),
    "moefication_similarity": Case(
        lambda s: MoEfication(s, split="coactivation", router="similarity", expert_size=8), site="neurons"
    ),
    "moefication_oracle": Case(lambda s: MoEfication(s, router="oracle", expert_size=8), site="neurons"),
    "moefication_random": Case(lambda s: MoEfication(s, router="random", expert_size=8), site="neurons"),
    "expert_prune": Case(lambda s: ExpertPrune(s, expert_size=8), site="neurons"),
    "expert_prune_layerwise": Case(lambda s: ExpertPrune(s, rates="layerwise", expert_size=8), site="neurons"),
    "attribution": Case(lambda s: Attribution(s), site="neurons"),
    "wina": Case(lambda s: Wina(s)),
    "wina_threshold": Case(lambda s: Wina(s, rule="threshold"), tolerance=0.04),
    "wina_transform": Case(lambda s: Wina(s, transform=True), families=GATED),
    "larosa": Case(lambda s: LaRoSA(s), families=GATED),
    "larosa_none": Case(lambda s: LaRoSA(s, rotation="none", tilt=0.5)),
    "rsparse": Case(lambda s: RSparse(s, remainder=0.1), tolerance=0.04),
    "rsparse_prompt": Case(lambda s: RSparse(s, remainder=0.0, dense_prompt=0.5), site=None),
    "topp": Case(lambda s: TopP(s, at="input"), site="mlp_in"),
    "topp_intermediate": Case(lambda s: TopP(s, at="intermediate", power=2.0), site="mlp_hidden"),
    "topk": Case(lambda s: TopK(s), site="mlp"),
    "maxp": Case(lambda s: MaxP(s, at="gate"), site="neurons", families=GATED),
    "statistical_topk": Case(lambda s: StatisticalTopK(s), site="neurons", tolerance=0.05, families=GATED),
    "statistical_topk_shift": Case(lambda s: StatisticalTopK(s, shift=True), site=None, families=GATED),
    "prox": Case(lambda s: Prox(s), site="neurons", tolerance=0.05),
    "dip": Case(lambda s: Dip(s), site="mlp"),
    "scap": Case(lambda s: Scap(s), site="mlp", tolerance=0.04),
    "scap_median": Case(lambda s: Scap(s, centre="median", tilt=0.0), site="mlp", tolerance=0.04),
    "chess": Case(lambda s: Chess(s), site="neurons", tolerance=0.05, families=GATED),
    "chess_mlp": Case(lambda s: Chess(s, attention=False), site="neurons", tolerance=0.05, families=GATED),
    "meangate": Case(lambda s: MeanGate(s, rank=8), site=None, families=GATED),
    "combined": Case(lambda s: Combined(s, steps=4), tolerance=0.04),
    "combined_copy": Case(lambda s: Combined(s, bits=4, steps=4), tolerance=0.06),
    "spon": Case(lambda s: RandomConstants(s), site=None),
    "sirius": Case(lambda s: CorrectedTeal(s), site=None, families=GATED),
}
