"""A made-up study in which every effect of the claims has the sign, or the absence, that was asked for.

Its noise is correlated as that of real rows is: what a window or an item costs is shared by the cells of a model and of
a method, neighbouring windows are alike, and a hard item is lost in many cells. Nothing in it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from harness import claims
from harness.claims import judge
from harness.results.collect import relate
from harness.results.identity import cell_id
from harness.results.rows import make_row, to_frame
from harness.results.samples import SAMPLES

LAYERS = 12
SWIGLU, RELU = "tiny-control", "tiny-relu"
SPARSITIES = (0.4, 0.6, 0.8)
SHARED, OWN = 0.1, 0.15  # nats/token: of a model's and of a method's cells together, and of a cell alone
NEIGHBOURS = 0.1  # correlation of neighbouring windows in what is shared
SAME_ITEMS = 0.4  # share of an item's fate that all cells have in common
CHANCE = {"piqa": 0.5, "gsm8k": 0.0}
BYTES = {"planted-400m": 4.4, "planted-1.6b": 4.4}  # a token of these models' tokenizers; 4 of the others
Draws = dict[tuple, NDArray[np.float64]]


class Planted:
    """sign: of every effect; 0 for none. ability: dense accuracy. noise: of the text, times what real rows have.

    strength: of the effects on text that are smallest beside that noise. falls: accuracy lost by the cells that change
    answers without losing any.
    """

    def __init__(
        self,
        sign: float = 1.0,
        ability: float = 0.75,
        achieved: float | None = None,
        execution: str = "kernel",
        limited: bool = False,
        windows: int = 12,
        items: int = 700,
        noise: float = 0.1,
        falls: float = 0.0,
        strength: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.sign, self.ability, self.achieved, self.execution, self.limited = (
            sign,
            ability,
            achieved,
            execution,
            limited,
        )
        self.windows, self.items, self.text_noise, self.falls = windows, items, noise, falls
        self.strength = strength
        self.rng = np.random.default_rng(seed)
        self.rows: list[dict[str, Any]] = []
        self.dense_cells: dict[str, str] = {}
        self.samples: list[pd.DataFrame] = []
        self.specs: list[tuple] = []
        self.draws: Draws = {}
        self.make()

    def make(self) -> None:
        """Add the cells."""
        for model in (SWIGLU, RELU):
            for length in (128, 512):
                for phase in ("all", "decode"):
                    self.cell(model, "dense", 0.0, length=length, phase=phase)
        self.methods()

    def methods(self) -> None:
        sign, strength = self.sign, self.strength
        for model, harm in ((SWIGLU, 1.0), (RELU, 1.0 - 0.5 * sign)):
            for s in SPARSITIES:
                time = 1.0 / (1 - s * 0.4 * sign)
                self.cell(model, "teal", s, text=0.5 * strength * harm * s**2, wrong=0.3 * harm * s, time=time)
            recall = 0.8 - 0.1 * sign * (model == SWIGLU)
            for predictor, lost, recalled in (
                ("serial", 0.3, recall), ("lookahead", 0.3 + 0.1 * sign, recall - 0.1 * sign),
            ):  # fmt: skip
                variant = None if predictor == "serial" else f"predictor={predictor}"
                self.cell(model, "dejavu", 0.5, variant=variant, text=lost, wrong=0.1, recall=recalled)
            self.cell(model, "dejavu", 0.5, variant="predictor=oracle", text=0.3 - 0.2 * sign, wrong=0.1)
            self.cell(model, "cett", 0.5, variant="cett=0.2", wrong=0.1, natural=0.6 + 0.2 * sign * (model == RELU))
        for s in (0.25, 0.5):
            self.cell(SWIGLU, "kv_skip", s, variant="kv=mask_output", text=0.1, wrong=0.1)
            self.cell(SWIGLU, "kv_skip", s, text=0.1 + 0.2 * strength * sign * s, wrong=0.1)
        for length in (128, 512):
            lost = 0.1 + 0.05 * strength * sign * (length == 512)
            alike = (
                0.1 * self.ability / max(self.ability - CHANCE["piqa"], 0.1)
            )  # the same share of what there is to lose
            harm = {"text": lost, "wrong": 0.1, "failed": alike + 0.5 * sign}
            self.cell(SWIGLU, "griffin", 0.5, length=length, phase="decode", **harm)
        for length, lost in ((128, 0.1), (512, 0.1 + 0.2 * sign)):
            self.cell(SWIGLU, "kv_skip", 0.4, text=lost, wrong=0.1, length=length)
            self.cell(SWIGLU, "kv_skip", 0.4, variant="kv=mask_output", text=0.1, wrong=0.1, length=length)
        for method in ("tda", "cats"):  # answers change, and as many for the better as for the worse, but for `falls`
            phase = "decode" if method == "tda" else "all"
            share = claims.MATERIAL_FLIPS + 0.02 * sign if not self.falls else 0.06
            self.cell(SWIGLU, method, 0.1, text=0.0, swaps=share, wrong=self.falls, phase=phase)

    def cell(
        self,
        model: str,
        method: str,
        s: float,
        variant: str | None = None,
        text: float = 0.0,
        wrong: float = 0.0,
        failed: float | None = None,
        swaps: float = 0.0,
        time: float | None = None,
        recall: float | None = None,
        natural: float | None = None,
        length: int = 512,
        phase: str = "all",
        device: str | None = None,
        stored: str | None = None,
    ) -> str:
        """Add a cell, its rows and its samples; its id.

        text: nats/token lost. wrong: share of all items that go from right to wrong (`failed`: of generated ones).
        swaps: share that changes without a change in accuracy. time: speed-up of its kernel at batch 1. stored: the
        format of quantised weights, whose dense cell is quantised too; `text` is then what it loses to 16 bits.
        """
        where = ({"d": device} if device else {}) | ({"w": stored} if stored else {})
        name = cell_id({"model": model, "method": method, "sparsity": s, "v": variant, "l": length, "p": phase} | where)
        self.dense_cells[name] = f"{model} {stored} {length}"
        called = f"{model}-{stored}" if stored else model
        activation = "relu" if "relu" in model else "silu"
        same = {"cell_id": name, "model": called, "family": "llama", "activation": activation, "method": method}
        same |= {"variant": variant, "sparsity_requested": s, "scope": "native", "phase": phase, "dense_prefix": 0}
        same |= {"seed": 0, "limited": self.limited, "execution": "dense" if method == "dense" else "masked"}
        same |= {"device": device} if device else {}
        same |= {"weight_format": f"Q4_1 as {stored}"} if stored else {}

        def row(probe: str, metric: str, value: float, n: int = 1000, unit: str = "share", **facts: Any) -> None:
            fact = {"probe": probe, "metric": metric, "value": float(value), "n": n, "unit": unit}
            self.rows.append(make_row(**(same | fact | facts)))

        spec = (name, model, method, variant, text, wrong, wrong if failed is None else failed, swaps, length, phase)
        spec += (stored,)
        self.specs.append(spec)
        self._quality(row, spec)
        if method != "dense":
            achieved = s if self.achieved is None else self.achieved
            for site in ("mlp", "model"):
                row("sparsity", "achieved", achieved, site=site, step_phase=phase)
        if natural is not None:
            self._natural(row, natural)
        if recall is not None:
            for layer, noise in enumerate(self._by_layer()):
                row("predictivity", "recall", recall + noise, site="neurons", layer=layer, step_phase="all")
                row("predictivity", "density", 0.5, site="neurons", layer=layer, step_phase="all")
        if method == "teal":
            self._hardware(row, s, time)
        return name

    def _natural(self, row: Callable, natural: float) -> None:
        facts = {"site": "mlp_hidden", "step_phase": "all"}
        for layer, noise in enumerate(self._by_layer()):
            tilt = 0.3 * self.sign * (0.5 - layer / LAYERS)
            row("sparsity", "achieved", natural + tilt + noise, layer=layer, **facts)

    def _hardware(self, row: Callable, s: float, time: float | None) -> None:
        for layer, noise in enumerate(self._by_layer()):
            for metric, batch, value in (
                ("reuse_previous", 1, 0.5 + 0.2 * self.sign), ("density", 1, 0.5),
                ("union_batch", 1, 0.4), ("union_batch", 32, 0.7 + 0.2 * self.sign),
            ):  # fmt: skip
                row("affinity", metric, value + noise, site="neurons", layer=layer, batch=batch)
        if time is None:
            return
        for batch, value in ((1, time), (8, time - 0.2 * self.sign)):
            where = {"batch": batch, "context": 128}
            row("latency", "time_ratio", value, unit="ratio", execution=self.execution, **where)
            row("latency", "step_bytes", 1000 * (1 - s / 2), unit="bytes", execution=self.execution, **where)
            row("latency", "step_bytes", 1000.0, unit="bytes", **(where | {"execution": "dense"}))

    def _by_layer(self) -> NDArray[np.float64]:
        """Noise by layer; neighbouring layers are 0.9 alike."""
        return _alike(self.rng, LAYERS, 0.9) * 0.01

    # -------------------------------------------------------------------------------------------------- samples

    def redraw(self, seed: int) -> list[pd.DataFrame]:
        """The samples of the same study on other text and other items."""
        self.rng, self.draws, self.samples = np.random.default_rng(seed), {}, []
        for spec in self.specs:
            self._quality(None, spec)
        return self.samples

    def _quality(self, row: Callable | None, spec: tuple) -> None:
        name, model, method, variant, text, wrong, failed, swaps, length, phase, stored = spec
        tokens = (length if phase == "all" else length // 2) - 1
        windows = self.windows * 512 // length
        nll = self._shared((model, length), windows, lambda n: self.rng.normal(3, 0.3, n)).copy()
        if method != "dense" or stored:
            near = NEIGHBOURS ** (length / 512)  # shorter windows are nearer to one another
            of_model = self._shared(("model", model, length), windows, lambda n: _alike(self.rng, n, near))
            of_method = self._shared(
                (model, method, variant, stored, length), windows, lambda n: _alike(self.rng, n, near)
            )
            noise = SHARED * (of_model + of_method) + OWN * _skewed(self.rng.normal(size=windows))
            nll += text + self.text_noise * noise
        self._sample(name, "perplexity", "text", nll, 0.0, tokens)
        if row is not None:
            facts = {"task": "perplexity", "step_phase": "all"}
            row("quality", "nll", nll.mean(), n=tokens * windows, unit="nats/token", **facts)
            width = math.log(2) * BYTES.get(model, 4.0)
            row("quality", "bits_per_byte", nll.mean() / width, n=tokens * windows, unit="bits/byte", **facts)
        for task, metric, lost in (("piqa", "acc", wrong), ("gsm8k", "exact_match:strict", failed)):
            value = self._answers(model, method, task, min(max(lost, 0.0), self.ability), swaps)
            self._sample(name, task, "accuracy", value, CHANCE[task], 0)
            if row is not None:
                row("quality", metric, value.mean(), n=self.items, task=task)

    def _answers(self, model: str, method: str, task: str, lost: float, swaps: float) -> NDArray[np.float64]:
        """Right or wrong by item: `lost` of all items go from right to wrong, and swaps / 2 each way."""
        right = self._shared((model, task), self.items, lambda n: (self.rng.random(n) < self.ability).astype(float))
        if method == "dense":
            return right
        common = self._shared(("items", task), self.items, lambda n: self.rng.normal(size=n))
        own = self.rng.normal(size=self.items)
        fate = stats.norm.cdf(np.sqrt(SAME_ITEMS) * common + np.sqrt(1 - SAME_ITEMS) * own)
        falls, rises = (lost + swaps / 2) / self.ability, swaps / 2 / (1 - self.ability)
        return np.where(right == 1, (fate >= falls).astype(float), (fate < rises).astype(float))

    def _shared(self, key: tuple, n: int, draw: Callable[[int], NDArray[np.float64]]) -> NDArray[np.float64]:
        if key not in self.draws:
            self.draws[key] = draw(n)
        return self.draws[key]

    def _sample(self, name: str, task: str, kind: str, value: NDArray[np.float64], chance: float, tokens: int) -> None:
        item = np.arange(len(value)).astype(str)
        facts = {"cell_id": name, "task": task, "kind": kind, "chance": chance, "tokens": tokens}
        self.samples.append(pd.DataFrame({"item": item, "value": np.asarray(value, float)} | facts)[list(SAMPLES)])

    def table(self) -> pd.DataFrame:
        return relate(to_frame(self.rows), self.dense_cells)

    def verdicts(self, **options: Any) -> pd.DataFrame:
        samples = pd.concat(self.samples, ignore_index=True)
        return claims.verdicts(self.table(), samples, **options).set_index("claim")

    def verdict(self, name: str) -> pd.Series:
        """The line of one claim, judged as if it were the only one."""
        alone = tuple(claim for claim in claims.CLAIMS if claim.name == name)
        with mock.patch.object(judge, "CLAIMS", alone):
            return self.verdicts().loc[name]


def _alike(rng: np.random.Generator, n: int, correlation: float) -> NDArray[np.float64]:
    """A skewed series of mean 0 and variance 1 whose neighbours are so correlated."""
    noise = rng.normal(size=n)
    for place in range(1, n):
        noise[place] = correlation * noise[place - 1] + np.sqrt(1 - correlation**2) * noise[place]
    return _skewed(noise)


def _skewed(normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard normal draws bent to a skewness of about 0.9, as what predictors cost by window has."""
    return (normal + 0.15 * (normal**2 - 1)) / np.sqrt(1 + 2 * 0.15**2)
