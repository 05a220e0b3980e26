"""The study's claims as statistical tests over collected rows and per-item samples: `python -m harness.claims`.

A claim is a function from the study to the evidence for it: values paired with a reference, signed so that above zero
supports it. The verdict is `reproduced` (the Holm-adjusted p is below 0.05 and the effect is as claimed), `not
reproduced` (the same with the opposite sign) or `inconclusive`, with what is missing named where something is.

What counts as evidence: measured rows whose status is ok, of whole runs (`limited=True` takes smoke runs in, and says
so); cells that were counted to skip something; tasks on which the dense model is above chance; times of kernels only.
"""

from harness.claims.consistency import MATERIAL_FLIPS
from harness.claims.evidence import ENOUGH, Claim, Evidence, shares_lost
from harness.claims.judge import CLAIMS, COLUMNS, main, print_verdicts, verdicts
from harness.claims.length import growth

__all__ = [
    "CLAIMS",
    "COLUMNS",
    "Claim",
    "ENOUGH",
    "Evidence",
    "MATERIAL_FLIPS",
    "growth",
    "main",
    "print_verdicts",
    "shares_lost",
    "verdicts",
]
