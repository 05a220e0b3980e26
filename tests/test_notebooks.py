"""Notebooks are stored without outputs, and run on stored rows: the committed study's, or a made-up one here."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from harness.report import archive
from harness.results.store import Store
from tests import synthetic_study

FOLDER = Path(__file__).parent.parent / "notebooks"
STUDY = FOLDER.parent / "results" / "study"
NAMES = ("01_pitfalls", "02_methods", "03_latency", "04_your_own_method")


def test_these_are_all_and_they_are_stored_without_outputs() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)
    for name in NAMES:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None), name


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with nothing but a small made-up study, archived as the committed one is."""
    root = tmp_path_factory.mktemp("made-up")
    synthetic_study.fill(Store(root / "run"))
    archive.write([root / "run"], root / "results" / "study")
    return root / "results"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_and_shows_what_it_says(name: str, results: Path, tmp_path: Path) -> None:
    shutil.copytree(results, tmp_path / "results")
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}
    outputs = run(name, tmp_path)
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    text = " ".join(output.get("text", "") for output in outputs)
    assert "text/html" in kinds  # a table
    assert name == "04_your_own_method" or "image/png" in kinds
    assert "nothing to draw" not in text
    assert {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_notebook_runs_on_the_committed_study(name: str, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "study").symlink_to(STUDY)
    assert run(name, tmp_path)


def test_without_results_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="there are no results in .*run a cell first"):
        run("02_methods", tmp_path)


def run(name: str, root: Path) -> list[dict]:
    """Outputs of all cells of a notebook that lies in `root`/notebooks."""
    (root / "notebooks").mkdir()
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(root / "notebooks")}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
