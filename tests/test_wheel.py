"""The project as a wheel: it runs outside of its checkout, with everything that it needs on board."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.tiny import save_with_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600  # seconds


def test_the_citation_names_this_version() -> None:
    import harness

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == harness.__version__
    assert {"title", "message", "authors", "license", "type"} <= set(citation)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which nothing but the wheel was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # A copy of what git knows: a build leaves folders behind, and must not take along what lies about.
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in names.stdout.decode().split("\0"):
        if name and not name.startswith("results/") or name == "results/published.csv":
            target = folder / "copy" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "copy")]
    subprocess.run(build, check=True, timeout=PATIENCE)
    (wheel,) = folder.glob("dynact-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def call(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python with the installed package, in a folder that has nothing of the project."""
    env = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=PATIENCE)


@pytest.mark.slow
def test_what_the_wheel_holds(site: Path) -> None:
    (wheel,) = site.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("conf/config.yaml", "conf/method/teal.yaml", "results/published.csv"):
        assert f"harness/shipped/{needed}" in names
    for needed in ("kernels/cpu/csrc/kernels.h", "harness/report/html.html", "harness/figures/style.mplstyle"):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests/", "results/", "conf/", "docs/"))]
    assert wheel.stat().st_size < 5e6


@pytest.mark.slow
def test_a_cell_runs_outside_of_the_checkout(site: Path, tmp_path: Path, tokenizer) -> None:
    model = save_with_tokenizer(tmp_path / "model", tokenizer)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {n}th of {n + 1} words is followed by another." for n in range(300)))
    small = (
        "probe=quick tasks=none dtype=float32 device=cpu calibration.tokens=256 calibration.window=64 logger=none "
        "probe.perplexity.window=64 probe.latency.min_seconds=0.1 probe.latency.context=[16]"
    ).split()
    texts = [f"calibration.path={text}", f"probe.perplexity.path={text}"]
    told = call(
        site, tmp_path, "-m", "dynact", "run", "model=local", f"model.path={model}", "method=teal", *small, *texts
    )
    assert told.returncode == 0, told.stderr
    assert "2 of 2 cells have results" in told.stderr
    shown = call(site, tmp_path, "-m", "dynact", "show", "teal")
    assert shown.returncode == 0 and "perplexity" in shown.stdout
    drawn = call(site, tmp_path, "-m", "harness", "figures", "--limited")
    assert drawn.returncode == 0, drawn.stderr
    script = [str(site / "bin" / "dynact"), "show", "teal"]
    env = os.environ | {"PYTHONPATH": str(site)}
    assert subprocess.run(script, cwd=tmp_path, env=env, capture_output=True, text=True).stdout == shown.stdout
    where = call(site, tmp_path, "-c", "import harness, dynact; print(harness.__file__); dynact.Teal")
    assert where.stdout.startswith(str(site))


@pytest.mark.slow
def test_students_are_said_to_lie_in_the_repository(site: Path, tmp_path: Path) -> None:
    told = call(site, tmp_path, "-m", "dynact", "run", "model=smollm2-135m-relu", "method=dense")
    assert told.returncode == 2
    assert "the students lie in the repository" in told.stderr
