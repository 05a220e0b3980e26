"""One checked cell: its canonical facts, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.results.identity import RUN_KEYS, cell_id, content_key
from harness.run import probing
from harness.run.canonical import DENSE, canonical
from harness.run.checks import check_values
from harness.run.machine import pick_device, pick_dtype
from harness.run.nest import build_methods, incomplete

if TYPE_CHECKING:
    from harness.execution.method import Method


@dataclass(frozen=True)
class CellConfig:
    """One checked cell. plain: canonical facts, what its id is made from. index: of the GPU, if one was named."""

    plain: dict[str, Any]
    index: int | None = None

    def __getitem__(self, key: str) -> Any:
        return self.plain[key]

    @cached_property
    def id(self) -> str:
        """`<model>_<method>_<what was asked for>_<hash>`."""
        return cell_id(self.plain, self.asked)

    @property
    def asked(self) -> str | None:
        """What was requested in place of a sparsity, in a word; None where that was asked for."""
        if self.searching:
            return "search"
        if self["sparsity"] is None:
            return "-".join(v for m in build_methods(self["method"]) if (v := m.variant()))
        return None

    @property
    def method_name(self) -> str:
        """Nested methods joined by "+", outermost first."""
        return "+".join(self.plain["method"])

    @property
    def model_name(self) -> str:
        """The model's name in tables."""
        return self.plain["model"]["name"]

    @property
    def device(self) -> str:
        """cpu, cuda or cuda:N."""
        return self["device"] if self.index is None else f"{self['device']}:{self.index}"

    @property
    def reads(self) -> str:
        """Equal for cells of one tokenizer that read the same texts."""
        return content_key({key: self[key] for key in ("model", "tasks", "probe", "calibration")})

    @property
    def timed(self) -> bool:
        """Whether it measures times, which a neighbour would spoil."""
        return probing.timed(self["probe"])

    @property
    def searching(self) -> bool:
        """Whether it searches for a level instead of being asked for one."""
        return self["probe"]["names"] == ["search"]

    def dense_cell(self) -> CellConfig | None:
        """The dense cell of the same model, tasks, seed, phase and texts; None where there is nothing to compare."""
        if self.method_name == "dense" or "quality" not in self["probe"]["names"]:
            return None
        return CellConfig(canonical(self.plain | {"method": DENSE}), self.index)


def check(plain: Mapping[str, Any]) -> CellConfig:
    """Check one composed config (plain types). Raises `ConfigError` with one sentence."""
    cfg = {key: value for key, value in plain.items() if key not in RUN_KEYS}
    check_values(cfg)
    far = (plain.get("engine") or {}).get("processor")
    if far is not None and cfg["device"] != "cpu":  # that of other machines: this one may have none, or another
        cfg |= {"device": "cuda", "dtype": pick_dtype(cfg["dtype"], "cuda"), "processor": str(far).replace("_", " ")}
        return _checked(cfg, None)
    return _checked(cfg, pick_device(str(cfg["device"]))[1])


def _checked(cfg: dict[str, Any], index: int | None) -> CellConfig:
    methods = build_methods(cfg["method"])
    _check_probes_of(methods, cfg)
    for name, options in cfg["method"].items():
        if options.get("sparsity", cfg["sparsity"]) != cfg["sparsity"]:
            raise ConfigError(f"a cell has one requested sparsity: give sparsity=, not method.{name}.sparsity=")
    return CellConfig(canonical(cfg), index)


def _check_probes_of(methods: Sequence[Method], cfg: Mapping[str, Any]) -> None:
    """Whether the probes mean something for these methods, and they for each other."""
    if sentence := incomplete(methods):
        raise ConfigError(sentence)
    if cfg["model"]["source"] == "shape" and (asked := probing.needs_weights(cfg["probe"])):
        raise ConfigError(
            f"{cfg['model']['name']} has random weights, for latency and memory only: probe {asked[0]} would measure "
            "noise (take probe=latency)"
        )
    if cfg["model"].get("device_map") is not None and probing.timed(cfg["probe"]):
        raise ConfigError(
            "model.device_map is for quality and sparsity, since its GPUs wait for one another: leave latency out of "
            "probe.names"
        )
    probing.check(cfg, methods)
