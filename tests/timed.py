"""What the tests of the latency probe share: a small run, and what is planned for a method."""

from __future__ import annotations

from harness.model.step import Policy
from harness.probes import latency
from methods.teal import Teal
from tests import tiny

CHOICE = {"execution": "auto", "compile": False, "context": [16], "new_tokens": 5}
CONFIG = CHOICE | {"batch": [1], "repeats": 3, "min_seconds": 0.0}


def fitted_teal():
    """A tiny view, and TEAL at 50 % fitted on it."""
    view = tiny.view("llama")
    method = Teal(0.5)
    return view, [(method, method.fit(view, tiny.calibration(view)))]


def planned(view, fitted, execution="auto", phase="all", fused=False, **options):
    """The variants, those of the fused CPU step only where asked for: most tests are about the module's own steps."""
    config = CHOICE | {"execution": execution} | options
    plan = latency.variants(view, fitted, Policy(phase), 0.5, config, tiny.tokens(2, 96))
    return [variant for variant in plan if fused or not variant.fused]


def executions(rows, batch):
    """In the order of the variants: dense, its tuned GEMV, the kernel at 0 %, the method, the slice."""
    return [r["execution"] for r in rows if r["metric"] == "tpot_median" and r["batch"] == batch]
