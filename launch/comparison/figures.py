"""Figures of a table."""

from __future__ import annotations

import math
import statistics


def mean_and_deviation(values: list[float], form: str = "{:.3f} ± {:.3f}") -> str:
    """Of one value, a deviation of 0; not a number where a value is none."""
    known = all(map(math.isfinite, values))
    deviation = (statistics.stdev(values) if known else math.nan) if len(values) > 1 else 0.0
    return form.format(statistics.fmean(values), deviation)
