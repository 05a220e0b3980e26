"""What a command does not need it does not load: libraries that take seconds stay out of commands that take none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import synthetic_study

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("torch", "transformers", "lm_eval", "datasets", "safetensors.torch", "triton", "accelerate")
DRAWING = ("matplotlib", "wandb", "sklearn")
MODEL_CODE = ("transformers.modeling_utils", "transformers.activations", "torch._dynamo", "lm_eval", "setuptools")
LOADED = """
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
    try:
        exec({code!r})
    except SystemExit as end:
        assert end.code in (0, None), err.getvalue()
print(json.dumps(sorted(sys.modules)))
"""


def loaded(code: str) -> set[str]:
    """The modules that a fresh process has loaded after this code."""
    command = [sys.executable, "-c", LOADED.format(code=code)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


HARNESS = "from harness.cli import main; sys.exit(main({arguments!r}))"
RUN = "import harness.run.app as app; sys.argv = ['run.py']; sys.exit(app.main({arguments!r}))"


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        (HARNESS.format(arguments=["--help"]), (*MODELS, *DRAWING, "pandas", "scipy", "hydra")),
        (RUN.format(arguments=["--help"]), (*MODELS, *DRAWING, "pandas", "scipy")),
        (HARNESS.format(arguments=["claims", "--help"]), (*MODELS, *DRAWING, "scipy.stats")),
        # Methods are built before a plan is made, and they are written in torch; of models nothing is loaded.
        ("from harness.run import plan; plan.read(['device=cpu', 'dtype=float32'], False)",
         (*MODEL_CODE, *DRAWING, "datasets", "accelerate", "scipy.stats")),
    ],
    ids=["harness", "run", "claims", "plan"],
)  # fmt: skip
def test_a_command_loads_no_library_that_it_does_not_need(code: str, unwanted: tuple[str, ...]) -> None:
    assert sorted(loaded(code) & set(unwanted)) == []


def test_verdicts_are_computed_without_torch(tmp_path: Path) -> None:
    """The whole command on rows, not its import alone."""
    synthetic_study.table().head(300).to_parquet(tmp_path / "table.parquet")
    found = loaded(HARNESS.format(arguments=["claims", str(tmp_path)]))
    assert "pandas" in found and sorted(found & {*MODELS, *DRAWING}) == []
