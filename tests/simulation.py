"""How often the claims are wrong: studies without an effect and with one, through claims and judge as they are.

Run: python -m tests.simulation --out results/bench/claims_simulation.json (minutes on 16 cores)
"""

from __future__ import annotations

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from harness import claims
from harness.claims import judge
from tests import planted
from tests.planted import Planted
from tests.planted_models import BETWEEN, PlantedModels

# Of the right size for the numbers of windows and items that are drawn: about what `power` says.
SCENARIOS: dict[str, dict[str, Any]] = {
    "null": {"sign": 0.0, "windows": 64, "items": 1500, "noise": 1.0},
    "effect": {"sign": 1.0, "windows": 64, "items": 2500, "noise": 1.0, "strength": 4.0},
    "models null": {"sign": 0.0, "windows": 64, "items": 1000, "noise": 1.0},
    "models effect": {"sign": 1.0, "windows": 64, "items": 1000, "noise": 1.0},
    "accuracy falls by the margin": {"falls": claims.MARGIN, "windows": 12, "items": 1500, "noise": 1.0},
}
NOMINAL = 0.05
Study = tuple[Planted, pd.DataFrame]
_made: dict[str, Study] = {}


def judged(scenario: str, seed: int) -> pd.DataFrame:
    """The verdicts on one made-up study: claim, verdict, p, effect, power. Of models: by the claims between them."""
    if scenario not in _made:
        maker = PlantedModels if scenario.startswith("models") else Planted
        study = maker(**SCENARIOS[scenario])
        _made[scenario] = study, study.table()
    study, table = _made[scenario]
    own = tuple(c for c in claims.CLAIMS if c.name in BETWEEN) if isinstance(study, PlantedModels) else claims.CLAIMS
    with mock.patch.object(judge, "CLAIMS", own):
        lines = claims.verdicts(table, pd.concat(study.redraw(seed), ignore_index=True))
    return lines[["claim", "verdict", "p", "effect", "power"]].assign(scenario=scenario, seed=seed)


def simulate(scenario: str, studies: int, workers: int = 1) -> pd.DataFrame:
    """The verdicts on so many studies."""
    seeds = range(1, studies + 1)
    if workers == 1:
        return pd.concat([judged(scenario, seed) for seed in seeds])
    with ProcessPoolExecutor(workers) as pool:
        return pd.concat(pool.map(judged, [scenario] * studies, seeds, chunksize=4))


def most(studies: int, rate: float = NOMINAL) -> int:
    """False alarms that as many studies have once in ten thousand, if they come at 1.5 times this rate at most."""
    return int(scipy_stats.binom.isf(1e-4, studies, 1.5 * rate))


def table(lines: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """By claim: studies, how many had p < 0.05, each verdict, mean effect and what was said to be detectable."""
    by_claim = {}
    for claim, group in lines.groupby("claim", sort=False):
        counts = group["verdict"].value_counts()
        by_claim[str(claim)] = {
            "studies": len(group),
            "p_below_0.05": int((group["p"] < NOMINAL).fillna(False).sum()),
            **{verdict.replace(" ", "_"): int(counts.get(verdict, 0)) for verdict in claims.VERDICTS},
            "effect": _rounded(group["effect"].mean()),
            "power": _rounded(group["power"].mean()),
        }
    return by_claim


def _rounded(value: Any) -> float | None:
    return None if pd.isna(value) or not math.isfinite(value) else float(f"{value:.4g}")


def any_alarm(lines: pd.DataFrame) -> int:
    """Studies in which any claim had a verdict, for or against."""
    wrong = lines["verdict"].isin(["reproduced", "not reproduced"])
    return int(wrong.groupby(lines["seed"]).any().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/bench/claims_simulation.json"))
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument(
        "--scenarios", nargs="*", choices=list(SCENARIOS), default=list(SCENARIOS), help="others are kept"
    )
    args = parser.parse_args()
    kept = json.loads(args.out.read_text())["scenarios"] if args.out.exists() else {}
    result: dict[str, Any] = {
        "command": "python -m tests.simulation --out results/bench/claims_simulation.json",
        "about": "verdicts on made-up studies, through harness.claims as it is; see tests/planted.py for the noise",
        "noise": {
            "nats/token of a model's and of a method's cells together": planted.SHARED,
            "nats/token of a cell alone": planted.OWN,
            "correlation of neighbouring windows in what is shared": planted.NEIGHBOURS,
            "share of an item's fate in common": planted.SAME_ITEMS,
        },
        "scenarios": {},
    }
    for scenario, facts in SCENARIOS.items():
        if scenario not in args.scenarios:
            continue
        lines = simulate(scenario, args.studies, args.workers)
        tests = lines[lines["verdict"] != "described"]["claim"].nunique()
        kept[scenario] = {
            "study": facts,
            "claims": table(lines),
            "studies_with_any_verdict": any_alarm(lines),
            "tests": tests,
        }
        result["scenarios"] = {name: kept[name] for name in SCENARIOS if name in kept}
        args.out.write_text(json.dumps(result, indent=1) + "\n")  # each as it comes
        print(scenario, any_alarm(lines), "of", args.studies, "with any verdict")
        print(pd.DataFrame(table(lines)).T.to_string())


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
