"""Samples to figures: p50, p95, spread; tables; how a figure stands to its budget. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One row. `samples` in `unit`; `bare`: the bare alternative of the same run; `budget`: an upper bound for p50
    (a lower one when `more_is_better`)."""

    name: str
    unit: str
    samples: tuple[float, ...]
    bare: tuple[float, ...] = ()
    budget: float | None = None
    budget_p95: float | None = None
    more_is_better: bool = False
    note: str = ""

    @property
    def p50(self) -> float:
        """The median."""
        return quantile(self.samples, 0.5)

    @property
    def p95(self) -> float:
        """The 95th percentile."""
        return quantile(self.samples, 0.95)

    @property
    def ratio(self) -> float | None:
        """Ours to bare, by medians."""
        return self.p50 / quantile(self.bare, 0.5) if self.bare and quantile(self.bare, 0.5) else None

    @property
    def met(self) -> bool | None:
        """Whether the budget holds; None without one."""
        if self.budget is None:
            return None
        if self.more_is_better:
            return self.p50 >= self.budget
        return self.p50 <= self.budget and (self.budget_p95 is None or self.p95 <= self.budget_p95)

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {**asdict(self), "p50": self.p50, "p95": self.p95, "ratio_to_bare": self.ratio, "met": self.met}


def quantile(samples: Sequence[float], q: float) -> float:
    """Return the nearest-rank quantile; nan for no samples."""
    if not samples:
        return math.nan
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1 if q > 0 else 0)]


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a text table."""
    head = ("figure", "n", "p50", "p95", "min..max", "unit", "bare p50", "ratio", "budget", "met")
    rows = [head]
    for f in figures:
        spread = f"{min(f.samples):.4g}..{max(f.samples):.4g}" if f.samples else "-"
        bare = f"{quantile(f.bare, 0.5):.4g}" if f.bare else "-"
        ratio = f"{f.ratio:.2f}" if f.ratio is not None else "-"
        budget = "-" if f.budget is None else f"{'>=' if f.more_is_better else '<='} {f.budget:g}"
        met = {True: "yes", False: "NO", None: "-"}[f.met]
        rows.append(
            (f.name, str(len(f.samples)), f"{f.p50:.4g}", f"{f.p95:.4g}", spread, f.unit, bare, ratio, budget, met)
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)
