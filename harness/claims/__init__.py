"""The study's claims as statistical tests over collected rows and per-item samples: `python -m harness claims`.

A claim is a function from the study to the evidence for it: values paired with a reference, signed so that above zero
supports it. The verdict is `reproduced` (the Holm-adjusted p is below 0.05 and the effect is as claimed), `not
reproduced` (the same with the opposite sign), `inconclusive`, with what is missing named where something is, or
`described` where nothing that was averaged over is a sample: layers, methods, settings, machines. `level` says what the
verdict holds for (`harness.claims.evidence.LEVELS`), `power` what effect would not have been missed.

What counts as evidence: measured rows whose status is ok, of whole runs (`limited=True` takes smoke runs in, and says
so); cells that were counted to skip something; tasks on which the dense model is above chance; times of kernels only.
"""

from harness.claims.consistency import MARGIN, MATERIAL_FLIPS
from harness.claims.evidence import ALPHA, LEVELS, Claim, Evidence
from harness.claims.judge import CLAIMS, COLUMNS, main, verdicts
from harness.claims.length import growth
from harness.claims.show import POWER, REACH, VERDICTS, by_model, effect, levels, print_verdicts, spread

__all__ = [
    "ALPHA",
    "CLAIMS",
    "COLUMNS",
    "Claim",
    "Evidence",
    "LEVELS",
    "MARGIN",
    "MATERIAL_FLIPS",
    "POWER",
    "REACH",
    "VERDICTS",
    "by_model",
    "effect",
    "growth",
    "levels",
    "main",
    "print_verdicts",
    "spread",
    "verdicts",
]
