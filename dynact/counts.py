"""Achieved sparsity as a user reads it: shares of what the tokens that went through a model did not touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

TOTALS = ("model", "mlp", "attn")


@dataclass(frozen=True)
class Achieved:
    """What was skipped, counted over all valid tokens: shares between 0 and 1, exact, not estimates.

    model: of all linear weights of the decoder blocks. mlp, attn: of those of the MLPs, of attention. sites: of the
    channels, neurons or heads at each site that the methods touch. tokens: how many were counted. rows: the same and
    more, by phase (prefill, decode, all) and layer, as plain dictionaries.
    """

    model: float
    mlp: float
    attn: float
    tokens: int
    sites: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Achieved:
        """From the rows of `harness.probes.sparsity.rows_of`."""
        whole = [row for row in rows if row["metric"] == "achieved" and row["layer"] is None]
        every = {row["site"]: row for row in whole if row["step_phase"] == "all"}
        shares = {name: float(every[name]["value"]) for name in TOTALS}
        sites = {site: float(row["value"]) for site, row in every.items() if site not in TOTALS}
        return cls(**shares, tokens=every["model"]["n"], sites=sites, rows=tuple(rows))

    def phase(self, name: str) -> Achieved:
        """The same of the tokens of one phase, "prefill" or "decode". Raises KeyError where there were none."""
        own = [dict(row, step_phase="all") for row in self.rows if row["step_phase"] == name]
        if not own:
            raise KeyError(f"no token of phase {name!r} was counted")
        return Achieved.of(own)

    def frame(self) -> pd.DataFrame:
        """`rows` as a table: metric, site, layer (missing for sums over layers), step_phase, value, n, unit."""
        import pandas as pd

        columns = ["metric", "site", "layer", "step_phase", "value", "n", "unit"]
        return pd.DataFrame(self.rows, columns=columns).astype({"layer": "Int64"})

    def __str__(self) -> str:
        sites = ", ".join(f"{site} {share:.3f}" for site, share in self.sites.items())
        return (
            f"{self.model:.3f} of the block weights skipped (MLP {self.mlp:.3f}, attention {self.attn:.3f}) over "
            f"{self.tokens} tokens" + (f"; by site: {sites}" if sites else "")
        )
