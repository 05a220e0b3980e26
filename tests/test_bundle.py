"""`make bundle`: what goes into it, and that nothing is fetched where one was unpacked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FETCHING = ("PIP_NO_INDEX", "PIP_FIND_LINKS", "DYNACT_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def exported(folder: Path) -> dict[str, str]:
    """The variables that make gives to its commands in this folder."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "constraints.txt").write_text("torch==2.11.0\n")
    (folder / "show.mk").write_text("include Makefile\nshow:\n\t@env\n")
    done = subprocess.run(
        ["make", "-f", "show.mk", "show"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    return dict(line.partition("=")[::2] for line in done.stdout.splitlines() if "=" in line)


def test_in_an_unpacked_bundle_pip_and_prefetch_stay_in_it(tmp_path: Path) -> None:
    assert not set(FETCHING) & set(exported(tmp_path))
    (tmp_path / "bundled/wheels").mkdir(parents=True)
    found = exported(tmp_path)
    assert found["PIP_NO_INDEX"] == found["HF_HUB_OFFLINE"] == found["HF_DATASETS_OFFLINE"] == "1"
    assert found["PIP_FIND_LINKS"] == str(tmp_path / "bundled/wheels")
    assert found["DYNACT_CACHE"] == str(tmp_path / "bundled/cache")


def test_a_bundle_is_this_commit_with_wheels_data_and_the_models_that_are_named() -> None:
    done = subprocess.run(["make", "-n", "bundle", "models=a b"], cwd=ROOT, capture_output=True, text=True, check=True)
    installs = subprocess.run(["make", "-nB", "setup"], cwd=ROOT, capture_output=True, text=True, check=True)
    extras = [re.findall(r"\.\[([\w,]+)\]", said) for said in (done.stdout, installs.stdout)]
    assert extras[0][-1:] == extras[1] and len(extras[1]) == 1, "wheels of all that set-up installs"
    steps = ("git archive HEAD", "pip download", "-m harness prefetch a b", "tar -cf build/dynact-bundle.tar")
    places = [done.stdout.index(step) for step in steps]
    assert places == sorted(places)


@pytest.mark.parametrize(("patch", "minor"), [(0, 1), (1, 0)])
def test_a_bundle_made_with_another_python_says_so_before_it_installs(tmp_path: Path, patch: int, minor: int) -> None:
    """Its wheels are for that series, and may ask for the patch that they were chosen by."""
    here = sys.version_info
    made = f"{here.major}.{here.minor + minor}.{here.micro + patch}"
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bundled/wheels").mkdir(parents=True)
    (tmp_path / "bundled/python").write_text(f"{made}\n")
    command = ["make", "setup", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and f"this bundle was made with Python {made}, and" in done.stderr
    assert not (tmp_path / ".venv").exists()


def no_network() -> bool:
    """Whether a command can be run in a namespace without routes here."""
    unshare = shutil.which("unshare")
    return unshare is not None and subprocess.run([unshare, "-n", "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not no_network(), reason="needs unshare, and the right to make a network namespace")
def test_a_bundle_runs_without_a_network(tmp_path: Path) -> None:
    """Packed here, with the network; unpacked, set up and run where nothing can be reached. Takes many minutes."""
    subprocess.run(["make", "bundle"], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-xf", ROOT / "build/dynact-bundle.tar", "-C", tmp_path], check=True)
    home = tmp_path / "home"
    home.mkdir()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "HF_", "DYNACT_"))}
    done = subprocess.run(
        ["unshare", "-n", "make", "run"],
        cwd=tmp_path / "dynact",
        env=plain | {"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cells have results" in done.stderr and list((tmp_path / "dynact/results/figures").glob("*.*"))
