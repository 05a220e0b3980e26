"""The archive of a study: made from folders of cells or older archives, and read as the cells are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd
import pytest

from harness import claims
from harness.report import archive
from harness.results.collect import collect
from harness.results.find import find
from harness.results.samples import read_samples
from harness.results.store import Store
from tests import synthetic_study


@pytest.fixture(scope="module")
def archived(tmp_path_factory) -> tuple[Path, Path]:
    """A results folder with a study's cells, and its archive."""
    root = tmp_path_factory.mktemp("archive")
    synthetic_study.fill(Store(root / "run"))
    archive.write([root / "run"], root / "run2" / "study")
    return root / "run", root / "run2"


def rows(table: pd.DataFrame) -> list[tuple]:
    return sorted(table.astype("string").fillna("").itertuples(index=False, name=None))


def test_an_archive_reads_as_the_cells_do(archived):
    run, study = archived
    found = find(study)
    assert found.folder == study / "study"
    assert rows(found.table) == rows(collect(run))
    assert rows(found.samples) == rows(read_samples(run))
    ours = claims.verdicts(found.table, found.samples)
    assert rows(pd.read_csv(found.folder / "claims.csv")[["claim", "verdict"]]) == rows(ours[["claim", "verdict"]])


def test_hashes_and_counts_are_those_of_the_files(archived):
    folder = archived[1] / "study"
    said = json.loads((folder / "study.json").read_text())
    for name, facts in said["files"].items():
        content = (folder / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (facts["bytes"], facts["sha256"])
    cells = pd.read_parquet(folder / "cells.parquet")
    assert said["cells"] == {"done": len(cells)} and all(json.loads(text)["model"] for text in cells["config"])
    assert set(cells["environment"]) == set(json.loads((folder / "environment.json").read_text()))
    assert pd.read_csv(folder / "table.csv").shape[0] == int(find(archived[1]).table["layer"].isna().sum())


def test_sittings_are_merged_to_the_same_bytes(archived, tmp_path):
    run, study = archived
    first, second = tmp_path / "first", tmp_path / "second"
    for place in (first, second):
        (place / "cells").mkdir(parents=True)
    for index, name in enumerate(Store(run).cells()):  # every third cell in both
        for place in {0: (first,), 1: (second,), 2: (first, second)}[index % 3]:
            (place / "cells" / name).symlink_to(run / "cells" / name)
    archive.write([first], tmp_path / "half")
    archive.write([tmp_path / "half", second], tmp_path / "whole")
    for name in ("table.parquet", "samples.parquet", "cells.parquet", "claims.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (study / "study" / name).read_bytes(), name


def test_nothing_to_archive_is_one_sentence(tmp_path, capsys):
    assert archive.main([str(tmp_path), "--to", str(tmp_path / "study")]) == 2
    assert "neither cells nor an archived study" in capsys.readouterr().err
