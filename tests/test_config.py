"""From overrides to checked cells, in this process: what is the same cell, what is refused, what a sweep expands to."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import ConfigError
from harness.execution.method import Method
from harness.places import CONF
from harness.results.identity import RUN_KEYS
from harness.run.cell import identity
from harness.run.checks import options
from harness.run.config import CellConfig, check
from harness.run.nest import build_methods
from harness.run.overrides import GROUPS, composed, expand, opening, parse, rewrite, to_plain
from harness.values import did_you_mean


def cell(*overrides: str, multirun: bool = False) -> CellConfig:
    """One checked cell, as the command line makes it."""
    return check(composed(rewrite(list(overrides), multirun)))


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The default config, composed once."""
    return composed([])


def changed(plain: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with one (dotted) key set."""
    head, _, rest = key.partition(".")
    return plain | {head: changed(plain[head], rest, value) if rest else value}


# --------------------------------------------------------------------------------------- the same cell


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["sparsity=0.5"], ["sparsity=5e-1"]),
        (["tasks=piqa"], ["tasks=[piqa]"]),
        (["tasks=[piqa]"], ["tasks=[piqa]", "results=/tmp/elsewhere", "logger=none", "dry=true", "retry=true"]),
        (["method=dense"], ["method=dense", "sparsity=0.3", "scope=model", "dense_prefix=4"]),
        (["method=random"], ["method=random", "calibration.tokens=4096"]),
        (["phase=auto"], ["phase=all"]),
    ],
)
def test_two_ways_to_say_the_same_cell_share_its_id(one: list[str], other: list[str]) -> None:
    assert cell(*one).id == cell(*other).id


@pytest.mark.parametrize(
    "override",
    [
        "sparsity=0.4",
        "method=random",
        "method.teal.allocation=greedy",
        "tasks=[piqa]",
        "tasks.limit=10",
        "seed=1",
        "phase=decode",
        "dense_prefix=1",
        "batch_size=4",
        "dtype=float16",  # auto is one of the other two, by the machine
        "data=hub",
        "calibration.tokens=4096",
        "probe.perplexity.windows=8",
        "probe=quick",
    ],
)
def test_whatever_changes_the_numbers_makes_another_cell(override: str) -> None:
    assert cell(override).id != cell().id


def test_a_users_text_is_part_of_the_cell_by_its_content(tmp_path: Path) -> None:
    path, keys = tmp_path / "text", ("calibration.path", "probe.perplexity.path")
    path.write_text("one")
    before = {key: cell(f"{key}={path}").id for key in keys}
    assert before == {key: cell(f"{key}={path}").id for key in keys}
    path.write_text("two")
    for key in keys:
        assert cell(f"{key}={path}").id != before[key]


def test_a_users_weights_are_part_of_the_cell_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    ids = []
    for weights in (b"one", b"other"):
        (tmp_path / "model.safetensors").write_bytes(weights)
        ids.append(cell("model=local", f"model.path={tmp_path}").id)
    assert ids[0] != ids[1]


def test_a_level_that_is_counted_is_counted_on_calibration_text() -> None:
    """Also of a method that needs nothing else, whose calibration settings are no part of a cell otherwise."""
    for scope, counts in (("native", False), ("model", False), ("achieved", True)):
        ids = {cell("method=dip", f"scope={scope}", f"calibration.tokens={tokens}").id for tokens in (4096, 8192)}
        assert len(ids) == (2 if counts else 1), scope
    with pytest.raises(ConfigError, match="scope must be one of native, model, achieved, not 'all'"):
        cell("scope=all")


def test_the_dense_cell_is_one_cell_for_every_method_and_sparsity() -> None:
    dense = cell("method=dense").id
    assert cell("method=dense").dense_cell() is None and cell("probe=sparsity").dense_cell() is None
    for overrides in (["sparsity=0.3"], ["method=random"], ["method=oracle", "scope=model"]):
        assert cell(*overrides).dense_cell().id == dense
    assert cell("seed=1").dense_cell().id != dense


@pytest.mark.parametrize(
    ("overrides", "oracle"),
    [
        (["method=oracle"], False),  # column norms and the token itself: WINA, which anyone can deploy
        (["method=attribution"], True),
        (["method=kv_skip"], True),
        (["method=kv_skip", "method.kv_skip.select_by=serial"], False),
        (["method=moefication", "method.moefication.router=oracle"], True),
        (["method=moefication"], False),
        (["method=[teal,dejavu]", "method.dejavu.predictor=oracle"], True),
        (["method=dejavu"], False),
    ],
)
def test_rows_of_oracles_say_so(overrides: list[str], oracle: bool) -> None:
    config = cell(*overrides)
    message = identity(config, build_methods(config["method"]))["message"]
    assert (message or "").startswith("oracle: ") == oracle
    assert message is None or "teal" not in message, "it names the oracle"


def test_the_id_is_readable(plain: dict[str, Any]) -> None:
    assert re.fullmatch(r"smollm2-135m_teal_s0\.5_[0-9a-f]{10}", check(plain).id)
    assert not RUN_KEYS & {"sparsity", "method", "model", "seed"}
    assert not RUN_KEYS & check(plain).plain.keys()


def test_auto_phase_is_all_unless_the_method_exists_only_in_decode() -> None:
    assert cell("method=teal")["phase"] == "all"
    assert cell("method=griffin")["phase"] == "decode"


# --------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("sparsity", 1.0, "at least 0 and below 1"),
        ("sparsity", -0.001, "at least 0 and below 1"),
        ("sparsity", float("nan"), "must be a number"),
        ("sparsity", None, "must be a number"),
        ("sparsity", True, "must be a number"),
        ("scope", "all", "scope must be one of native, model"),
        ("phase", "decod", "did you mean decode?"),
        ("dtype", "fp16", "dtype must be one of"),
        ("device", "gpu", "device must be auto, cpu, cuda or cuda:N"),
        ("device", "cuda:x", "device must be"),
        ("device", "3", "device must be"),
        ("dense_prefix", -1, "dense_prefix must be a whole number of at least 0"),
        ("dense_prefix", 1.5, "dense_prefix must be a whole number"),
        ("batch_size", 0, "batch_size must be a whole number of at least 1"),
        ("batch_size", "auto", "batch_size must be a whole number"),
        ("seed", -1, "seed must be"),
        ("tasks.limit", 0, "tasks.limit"),
        ("tasks.num_fewshot", -1, "tasks.num_fewshot"),
        ("tasks.num_fewshot", {"piqa": -1}, "tasks.num_fewshot.piqa"),
        ("tasks.max_gen_toks", 0, "tasks.max_gen_toks"),
        ("tasks.names", ["piqaa"], "did you mean piqa?"),
        ("model.source", "file", "model.source"),
        ("model.path", "/no/such/place", "model.path names a folder that does not exist"),
        ("probe.names", [], "probe.names is empty"),
        ("probe.names", ["qualty"], "did you mean quality?"),
        ("probe.perplexity.window", 3, "probe.perplexity.window"),
        ("probe.perplexity.path", "/no/such/file", "probe.perplexity.path names a file that does not exist"),
        ("probe.latency.batch", [0], "probe.latency.batch"),
        ("probe.latency.new_tokens", 1, "probe.latency.new_tokens"),
        ("probe.latency.execution", "fast", "probe.latency.execution"),
        ("calibration.path", "/no/such/file", "calibration.path names a file that does not exist"),
        ("calibration.tokens", 100, "calibration.window is longer than calibration.tokens"),
    ],
)
def test_bad_values_are_refused_with_one_sentence(plain: dict[str, Any], key: str, value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(changed(plain, key, value))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@given(st.floats(min_value=0, max_value=1, exclude_max=True))
@settings(max_examples=20, deadline=None)
def test_every_share_below_one_is_a_sparsity(plain: dict[str, Any], sparsity: float) -> None:
    given = changed(changed(plain, "sparsity", sparsity), "method.teal.sparsity", sparsity)
    assert check(given)["sparsity"] == sparsity


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["method=teel"], "method=teel is unknown (did you mean teal?)"),
        (["model=smollm"], "model=smollm is unknown"),
        (["experiment=quikstart"], "did you mean quickstart?"),
        (["tasks=[piqa,arc_esy]"], "unknown task arc_esy: did you mean arc_easy?"),
        (["+method.teal.allocaton=greedy"], "method teal has no option 'allocaton' (did you mean allocation?)"),
        (["method.teel.allocation=greedy"], "method=teel is unknown"),
        (["model=local"], "model.path"),
        (["teal"], "write key=value"),
        (["sparsity=0.4,0.5"], "sparsity"),
    ],
)
def test_bad_overrides_are_refused_with_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cell(*overrides)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_an_override_that_can_not_be_read_is_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("'sparsity=[' can't be read")):
        parse(["seed=1", "sparsity=["])


def test_paths_with_letters_beyond_ascii_can_be_given_and_swept() -> None:
    assert composed(rewrite(["results=/tmp/é"], False))["results"] == "/tmp/é"
    swept = expand(rewrite(["results=/tmp/é,/tmp/b"], True))
    assert [composed(overrides)["results"] for overrides in swept] == ["/tmp/é", "/tmp/b"]


def test_an_option_of_no_method_is_refused_in_a_sweep_too() -> None:
    with pytest.raises(ConfigError, match="method=teel is unknown"):
        rewrite(["method=teal,random", "method.teel.allocation=greedy"], multirun=True)


@given(st.sampled_from(["teal", "random", "dense"]), st.integers(0, 10), st.characters(categories=["Ll"]))
def test_did_you_mean_finds_a_name_with_one_letter_wrong(name: str, at: int, letter: str) -> None:
    at %= len(name)
    assert did_you_mean(name[:at] + letter + name[at + 1 :], ["teal", "random", "dense"]) == f" (did you mean {name}?)"
    assert did_you_mean("zzzz", ["teal", "random"]) == ""


# --------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_is_every_combination_in_hydras_order() -> None:
    overrides = rewrite(["method=teal,random", "sparsity=0.4,0.5", "seed=1"], multirun=True)
    assert expand(overrides) == [
        [f"method={method}", f"sparsity={sparsity}", "seed=1"]
        for method in ("teal", "random")
        for sparsity in (0.4, 0.5)
    ]


def test_ranges_and_lists_of_tasks_expand_too() -> None:
    assert expand(["seed=range(0,3)"]) == [["seed=0"], ["seed=1"], ["seed=2"]]
    overrides = rewrite(["tasks=piqa,sciq"], multirun=True)
    assert [check(composed(job))["tasks"]["names"] for job in expand(overrides)] == [["piqa"], ["sciq"]]
    overrides = rewrite(["tasks=quick,none"], multirun=True)
    assert expand(overrides) == [["tasks=quick"], ["tasks=none"]]


def test_options_of_one_method_in_a_sweep_over_others_reach_only_that_method() -> None:
    overrides = rewrite(["method=teal,random", "method.teal.allocation=greedy"], multirun=True)
    teal, random = (check(composed(job)) for job in expand(overrides))
    assert teal["method"]["teal"]["allocation"] == "greedy"
    assert list(random["method"]) == ["random"]
    assert random.id == cell("method=random").id


def test_a_cell_leaves_nothing_of_its_overrides_to_the_next_one() -> None:
    """A config is composed once for a sweep's cells and lent to each; Hydra composes each anew."""
    given = [
        ["method=teal", "sparsity=0.4", "probe.names=[sparsity]", "+grid.mine=3", "++method.teal.weighted=false"],
        ["method=teal", "tasks.names=[piqa]", "tasks.num_fewshot={piqa: 5}", "probe.latency.batch=[1,2]"],
        ["method=teal", "sparsity=${grid.level}", "+grid.level=0.25", "model.name=mine"],
        ["method=teal", "sparsity=0.4", "probe.names=[sparsity]"],
        ["method=teal", "sparsity=1.5e400", "model.nothing=1"],
        ["method=teal"],
    ]
    for overrides in (*given, *reversed(given)):
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            try:
                anew = {k: v for k, v in to_plain(compose("config", overrides=overrides)).items() if k != "grid"}
            except HydraException:
                with pytest.raises(ConfigError):
                    composed(overrides)
                continue
        anew.pop("sweeps")
        assert composed(overrides) == anew
        assert list(composed(overrides)["method"]) == list(anew["method"])


def test_a_swept_option_of_a_method() -> None:
    overrides = rewrite(["method=teal", "method.teal.allocation=uniform,greedy"], multirun=True)
    allocations = [check(composed(job))["method"]["teal"]["allocation"] for job in expand(overrides)]
    assert allocations == ["uniform", "greedy"]


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_and_checks(name: str) -> None:
    base = opening([f"experiment={name}"])
    for sweep in base["sweeps"] or [[]]:
        overrides = rewrite([f"experiment={name}", *map(str, sweep)], multirun=True)
        for job in expand(overrides):
            check(composed(job))


# ------------------------------------------------------------------------------------- the config files


@pytest.mark.parametrize("name", options("method"))
def test_every_method_file_names_a_method_and_all_its_options(name: str) -> None:
    entry = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text())
    assert name in entry, "the key is the name that users type"
    for method in entry.values():
        module, _, cls = method["_target_"].rpartition(".")
        factory = getattr(importlib.import_module(module), cls)
        assert issubclass(factory, Method)
        assert set(method) - {"_target_"} == {field.name for field in fields(factory)}
        assert method["sparsity"] == "${sparsity}"


@pytest.mark.parametrize("group", [g for g in GROUPS if g != "model"])
def test_every_option_of_every_group_composes(group: str) -> None:
    for name in options(group):
        composed([f"{group}={name}"])
