"""The mean of paired differences, as the result of a claim."""

from __future__ import annotations

from typing import Any

from loratory.compare.statistics import Table, estimate, p_value


def mean_difference(table: Table, scale: float) -> dict[str, Any]:
    """Mean of a table of differences, seeds x rows, times scale: value, low, high; p, seeds, rows."""
    result = estimate(table)
    ends = {"value": result.value, "low": result.low, "high": result.high}
    return {
        **{part: None if number is None else scale * number for part, number in ends.items()},
        "p": p_value(result),
        "seeds": result.seeds,
        "rows": result.rows,
    }
