"""Probes are found by their files: one file and one YAML are all that a new one takes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import harness.probes
from harness.errors import ConfigError
from harness.places import CONF
from harness.run import overrides, probing
from harness.run.config import CellConfig, check

COUNT = """
def check(config, methods):
    if config["probe"]["count"]["windows"] < 1:
        raise ConfigError("nothing to count")

def windows(probe):
    return probe["count"]["windows"]

def run(bench):
    rows = [{"metric": "tokens", "value": float(bench.windows(1).tokens.numel()), "n": 1, "unit": "tokens"}]
    bench.commit("count", lambda: (rows,))
"""


@pytest.fixture
def count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe of a user's own: a file, and a YAML."""
    room, conf = tmp_path / "probes", tmp_path / "conf"
    shutil.copytree(CONF, conf)
    shutil.copytree(Path(harness.probes.__path__[0]), room)
    (room / "count.py").write_text("from harness.errors import ConfigError\n" + COUNT)
    (conf / "probe" / "count.yaml").write_text("defaults: [default, _self_]\nnames: [count]\ncount: {windows: 2}\n")
    monkeypatch.setattr(harness.probes, "__path__", [str(room)])
    for module in (probing, overrides):
        monkeypatch.setattr(module, "CONF", conf)
    monkeypatch.setattr("harness.run.checks.CONF", conf)


def cell(*given: str) -> CellConfig:
    return check(overrides.composed([*given]))


def test_the_probes_are_those_of_the_room() -> None:
    assert probing.names() == ["affinity", "frequency", "latency", "predictivity", "quality", "search", "sparsity"]
    assert all(callable(probing.module(name).run) for name in probing.names())


def test_what_probes_say_of_a_cell() -> None:
    settings = cell("tasks=none").plain["probe"]
    assert probing.timed(settings) and not probing.timed(settings | {"names": ["quality", "sparsity"]})
    assert probing.windows(settings) == settings["perplexity"]["windows"]
    assert probing.windows(settings | {"names": ["affinity"]}) == settings["sparsity"]["windows"]
    assert probing.texts(settings) == []
    assert probing.needs_weights(settings) == ["quality"]


def test_a_new_probe_is_a_file_and_a_yaml(count: None) -> None:
    assert "count" in probing.names()
    mine = cell("probe=count", "tasks=none", "method=random")
    assert mine["probe"]["count"] == {"windows": 2}
    assert probing.windows(mine["probe"]) == 2
    with pytest.raises(ConfigError, match="nothing to count"):
        cell("probe=count", "tasks=none", "method=random", "probe.count.windows=0")
    with pytest.raises(ConfigError, match=r"conf/probe/count.yaml: choose probe=count"):
        cell("probe.names=[count]", "tasks=none", "method=random")


def test_its_settings_are_no_part_of_other_cells(count: None) -> None:
    def named(windows: int, probe: str) -> str:
        given = [f"probe.count.windows={windows}", f"probe.names=[{probe}]"]
        return cell("probe=count", "tasks=none", "method=random", *given).id

    assert named(2, "sparsity") == named(3, "sparsity") == cell("probe=sparsity", "tasks=none", "method=random").id
    assert named(2, "count") != named(3, "count")


def test_a_probe_that_there_is_not_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"probe.names must be one of affinity, .* not 'afinity' \(did you mean"):
        cell("probe.names=[afinity]")
