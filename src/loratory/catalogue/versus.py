"""Claims that are checked by training: a comparison under one budget, and the difference of two of its methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loratory.catalogue.difference import mean_difference
from loratory.compare.engine import run_comparison
from loratory.compare.outcome import Comparison
from loratory.compare.settings import find_data, read_compare
from loratory.compare.statistics import chosen_runs, paired, scores

MEASURES = ("difference", "percent")
SPLITS = ("train", "dev", "test")


def settings_of(name: str, run: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The comparison's keys, with its data found and its folder set."""
    keys = dict(run["keys"])
    return keys | {split: str(find_data(keys[split], name)) for split in SPLITS} | {"out": str(folder(name, run, out))}


def folder(name: str, run: Mapping[str, Any], out: Path) -> Path:
    """Where a claim's training runs lie: one folder for all claims that name the same `runs`, so that none is trained twice."""
    return out / run.get("runs", name)


def versus(name: str, run: Mapping[str, Any], out: Path, say: Callable[[str], None], command: str) -> dict[str, Any]:
    """Run a claim's comparison, or what is missing of it, and measure."""
    comparison = run_comparison(read_compare(settings_of(name, run, out)), say=say, command=command)
    found = measured(comparison, run)
    here = f"{folder(name, run, out).resolve()}/"  # where it ran is nobody's concern
    return found | {"warnings": [warning.replace(here, "") for warning in found["warnings"]]}


def measured(comparison: Comparison, run: Mapping[str, Any]) -> dict[str, Any]:
    """First minus second, over common seeds and test rows: in the metric's unit, or in percent of the second.

    Where several methods stand on a side, the one that is best on dev counts. Raises RuntimeError where a side was not measured.
    """
    sides = [best_on_dev(comparison, run[side]) for side in ("first", "second")]
    found, on = scores(comparison, sides)
    table = paired(found[sides[0]], found[sides[1]])
    if table is None or on != "test":
        raise RuntimeError(f"{' and '.join(sides)} have no test scores of a common seed; run the claim again to go on")
    scale = 1.0
    if run["measure"] == "percent":
        scale = 100 / float(np.mean(list(found[sides[1]].values())))
    means = {f"mean of {side}": float(np.mean(list(found[side].values()))) for side in sides}
    return {
        **mean_difference(table, scale),
        "first": sides[0],
        "second": sides[1],
        **means,
        "rates": {side: comparison.chosen[side] for side in sides},
        "warnings": comparison.warnings,
        "fingerprint": comparison.fingerprint,
    }


def best_on_dev(comparison: Comparison, methods: Sequence[str]) -> str:
    """The method whose chosen runs have the best mean on dev."""
    means: dict[str, float] = {}
    for method in methods:
        values = [run.dev[comparison.metric] for run in chosen_runs(comparison, method) if comparison.metric in run.dev]
        if values:
            means[method] = float(np.mean(values)) * (1 if comparison.greater_is_better else -1)
    if not means:
        raise RuntimeError(f"none of {', '.join(methods)} has a run that ended; run the claim again to go on")
    return max(means, key=lambda method: means[method])
