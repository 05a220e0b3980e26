"""What users get wrong, and what fails under a run: one sentence each, before a model loads where that can be known."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Forks
from tests.runner import Runner

BAD = {
    "sparsity-high": (["sparsity=1.5"], "sparsity is a share: it must be at least 0 and below 1, not 1.5"),
    "sparsity-low": (["sparsity=-0.1"], "sparsity is a share"),
    "sparsity-word": (["sparsity=abc"], "sparsity must be a number, not 'abc'"),
    "method": (["method=teel"], "did you mean teal?"),
    "method-in-sweep": (["-m", "method=random,teel"], "did you mean teal?"),
    "method-option": (
        ["method.teal.alocation=greedy"],
        "method teal has no option 'alocation' (did you mean allocation?)",
    ),
    "task": (["tasks=[piqq]"], "unknown task piqq: did you mean piqa?"),
    "model-path": (["model.path=/no/such/folder"], "model.path names a folder that does not exist"),
    "hub": (["model=mistral-7b", "model.path=null"], "HF_HUB_OFFLINE is set"),
    "calibration": (["calibration.tokens=100000000"], "calibration asks for 100000000 tokens but the text has only"),
    "perplexity": (["probe.perplexity.windows=1000000"], "perplexity asks for"),
    "key": (["sparsty=0.4"], "sparsty"),
    "workers": (["workers=0"], "workers must be a whole number of at least 1, not 0"),
    "workers-and-launcher": (["workers=2", "hydra/launcher=basic"], "give either them or hydra/launcher"),
    "cells": (["cells=some"], "cells must be one of all, timed, untimed"),
    "no-cells": (["cells=timed", "probe.names=[quality]"], "cells=timed leaves no cell"),
    "on-error": (["on_error=halt"], "on_error must be one of go_on, stop"),
    "switch": (["force=yes please"], "force must be true or false, not 'yes please'"),
    "archived": (["archived=/no/such/study"], "archived names a folder without an archived study: /no/such/study"),
    "no-value": (["sparsity"], "'sparsity' is not an override: write key=value"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_sentence_before_a_model_loads(runner: Runner, name: str) -> None:
    overrides, sentence = BAD[name]
    out, err = runner.run(*overrides, code=2, before="pass")
    error, probe = err.splitlines()
    assert error.startswith("error: ") and sentence in error
    assert probe == "model code imported: False"
    assert out == ""
    assert runner.store.cells() == [] and not list(runner.results.glob("*"))


def test_results_that_can_not_be_written_end_before_a_model_loads(runner: Runner) -> None:
    (runner.folder / "file").write_text("")
    _, err = runner.run(f"results={runner.folder}/file/results", code=2, before="pass")
    assert err.splitlines()[0].startswith("error: results can't be stored in")
    assert err.splitlines()[1:] == ["model code imported: False"]


FULL = "import errno, os\ndef full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"


def test_a_disk_that_is_full_ends_before_a_model_loads(runner: Runner) -> None:
    _, err = runner.run(code=2, before=FULL + "import tempfile; tempfile.TemporaryFile = full")
    assert err.splitlines() == [
        f"error: results can't be stored in {runner.results}: the disk is full [see docs/cells.md]",
        "model code imported: False",
    ]
    assert runner.store.cells() == []


def test_a_disk_that_fills_up_leaves_whole_probes_and_the_run_can_go_on(runner: Runner) -> None:
    fills = FULL + (
        "import pandas as pd; write = pd.DataFrame.to_parquet\n"
        "def once(self, path, **k):\n"
        "    if 'probes' in str(path) and 'sparsity' in set(self.get('probe', ())): full()\n"
        "    return write(self, path, **k)\n"
        "pd.DataFrame.to_parquet = once"
    )
    _, err = runner.run("method=dense", code=2, before=fills)
    assert err.splitlines()[-2].startswith("error: results can't be stored in")
    assert "the disk is full" in err and "Traceback" not in err
    kept = runner.commits()
    assert {Path(name).name for name in kept} == {"perplexity", "quality-piqa"}
    runner.run("method=dense")
    assert kept.items() <= runner.commits().items()
    assert all(runner.store.view(cell).status["status"] == "done" for cell in runner.store.cells())


def test_a_model_that_can_not_be_read_is_one_sentence_and_mended_by_the_same_command(
    tmp_path: Path, tokenizer: Any, forks: Forks
) -> None:
    from tests.tiny import save_with_tokenizer

    runner = Runner(save_with_tokenizer(tmp_path / "model", tokenizer), tmp_path, forks)
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    command = ["method=dense", "probe.names=[sparsity]", "tasks=none"]
    _, err = runner.run(*command, code=2)
    assert err.splitlines()[-1].startswith("error: model model can't be loaded") and "Traceback" not in err
    weights.write_bytes(whole)
    runner.run(*command)


@pytest.fixture
def own(tmp_path: Path, tokenizer: Any) -> Path:
    """A model's folder to spoil."""
    from tests.tiny import save_with_tokenizer

    return save_with_tokenizer(tmp_path / "model", tokenizer)


def change(path: Path, **keys: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    facts = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))


@pytest.mark.parametrize(
    ("tasks", "keys", "sentence"),
    [
        ("piqa", {"eos_token": None, "bos_token": None}, "has no token for the beginning or the end of a text"),
        ("triviaqa", {"eos_token": None}, "(eos_token), by which the answers of triviaqa end"),
        ("gsm8k", {"pad_token": "<pad>"}, "pads with token 49152, but the model knows 49152 tokens only"),
    ],
)
def test_a_tokenizer_without_what_tasks_need_ends_before_a_model_loads(
    tmp_path: Path, own: Path, forks: Forks, tasks: str, keys: dict[str, Any], sentence: str
) -> None:
    change(own / "tokenizer_config.json", **keys)
    (own / "special_tokens_map.json").unlink(missing_ok=True)
    runner = Runner(own, tmp_path, forks)
    _, err = runner.run(f"tasks=[{tasks}]", "probe=quality", code=2, before="pass")
    error, probe = err.splitlines()
    assert error.startswith("error: the tokenizer of model ") and sentence in error
    assert probe == "model code imported: False"
    runner.run(f"tasks=[{tasks}]", "probe=sparsity", "dry=true", before="pass")  # which reads no special token


def test_a_byte_order_mark_is_no_part_of_a_text(runner: Runner) -> None:
    texts = [runner.folder / name for name in ("plain", "marked")]
    words = "Words that are long enough for a window or two. " * 400
    texts[0].write_text(words)
    texts[1].write_text(words, encoding="utf-8-sig")
    plans = [runner.run("dry=true", f"probe.perplexity.path={text}")[1] for text in texts]
    assert plans[0] == plans[1], "the same cells"
    from harness.data.text import own_text

    assert own_text(texts[1]) == words


@pytest.mark.parametrize("place", ["model.path", "results", "cwd", "cache"])
def test_a_path_that_is_no_utf8_ends_with_one_sentence(runner: Runner, tiny_folder: Path, place: str) -> None:
    latin = Path(os.fsdecode(os.fsencode(runner.folder) + b"/caf\xe9"))
    latin.mkdir()
    overrides = [f"{place}={latin}"] if place in ("model.path", "results") else []
    if place == "model.path":
        (latin / "config.json").write_text("{}")
    if place == "cwd":
        (runner.folder / "cwd").rmdir()
        latin.rename(latin.parent / latin.name)
        (runner.folder / "cwd").symlink_to(latin)
    if place == "cache":
        runner.env["DYNACT_CACHE"] = str(latin)
    _, err = runner.run(*overrides, code=2, before="pass")
    error, probe = err.splitlines()
    assert "caf\\udce9" in error and "bytes that are not UTF-8" in error
    assert probe == "model code imported: False"


def test_a_terminal_without_a_character_gets_its_code_and_paths_stay_whole_in_a_pipe(runner: Runner) -> None:
    runner.env |= {"PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    results = runner.folder / ("a-long-name-" * 12 + "\u00e9")
    _, err = runner.run("method=dense", "probe=sparsity", "tasks=none", f"results={results}", fresh=True)
    shown = str(results).encode("ascii", "backslashreplace").decode()
    assert f"rows: {shown}/table.csv and {shown}/table.parquet; cells: {shown}/cells" in err.splitlines()


def test_a_key_that_every_cell_must_name_can_be_swept(runner: Runner, tiny_folder: Path, tokenizer: Any) -> None:
    from tests.tiny import save_with_tokenizer

    other = save_with_tokenizer(runner.folder / "another", tokenizer, num_hidden_layers=2)
    runner.always = [o for o in runner.always if not o.startswith("model.path=")]
    _, err = runner.run("-m", f"model.path={tiny_folder},{other}", "method=random", "tasks=none", "dry=true")
    plan = [line.split()[0] for line in err.splitlines()]
    assert [name.split("_")[0] for name in plan] == [tiny_folder.name, tiny_folder.name, "another", "another"]
    _, err = runner.run("dry=true", code=2)
    assert "model.path" in err and len(err.splitlines()) == 1
