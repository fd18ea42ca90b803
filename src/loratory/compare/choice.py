"""Which run comes next, and which learning rate is taken: pure functions of the definition and what is there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

NO_RATE = 0.0  # of a method that trains nothing
EXTENSIONS = 3  # rates that are added to a grid at most
Bodies = Mapping[str, Mapping[str, Any]]  # key of a run -> what it came to


@dataclass(frozen=True)
class Step:
    """Something to do: train a run, or measure a trained one on test."""

    kind: Literal["train", "test"]
    label: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return key_of(self.label, self.rate, self.seed)


def key_of(label: str, rate: float, seed: int) -> str:
    """The name of a run in the results: what it is, since all else is the same in a comparison."""
    return f"{label} | learning rate {rate:g} | seed {seed}" if rate != NO_RATE else f"{label} | seed {seed}"


def searched(definition: Mapping[str, Any]) -> list[int]:
    """The seeds on which learning rates are tried."""
    return list(definition["seeds"][: definition["search_seeds"]])


def steps(definition: Mapping[str, Any], runs: Bodies, tests: Bodies, given_up: set[str]) -> Iterator[Step]:
    """All that can be done now. A run that diverged is finished; one that failed is, once it was given up."""

    def finished(key: str) -> bool:
        return key in given_up or (key in runs and runs[key]["status"] in ("done", "diverged"))

    for label, arm in definition["arms"].items():
        rates = arm["rates"] or [NO_RATE]
        wanted = [(rate, seed) for rate in rates for seed in searched(definition)] if arm["rates"] else []
        missing = [pair for pair in wanted if not finished(key_of(label, *pair))]
        if missing:
            yield from (Step("train", label, rate, seed) for rate, seed in missing)
            continue
        chosen = choose(definition, label, runs)
        if chosen is None:
            continue
        for seed in definition["seeds"]:
            key = key_of(label, chosen, seed)
            if not finished(key):
                yield Step("train", label, chosen, seed)
            elif runs.get(key, {}).get("status") == "done" and key not in tests and f"test {key}" not in given_up:
                yield Step("test", label, chosen, seed)


def choose(definition: Mapping[str, Any], label: str, runs: Bodies) -> float | None:
    """The rate with the best mean on dev over the search seeds; the smaller one of equals. None where no rate finished them all."""
    arm = definition["arms"][label]
    if not arm["rates"]:
        return NO_RATE
    scores: dict[float, float] = {}
    for rate in sorted(arm["rates"]):
        found = [runs.get(key_of(label, rate, seed), {}) for seed in searched(definition)]
        values = [run["dev"].get(definition["dev_metric"], math.nan) for run in found if run.get("status") == "done"]
        if len(values) == len(found) and all(map(math.isfinite, values)):
            scores[rate] = fmean(values) * (1 if definition["dev_greater"] else -1)
    return max(scores, key=lambda rate: scores[rate]) if scores else None


def beyond(rates: list[float], best: float) -> float | None:
    """The next rate after the edge at which the best one stands, at the grid's own distance; None where it is inside."""
    grid = sorted(rates)
    if len(grid) < 2 or best not in (grid[0], grid[-1]):
        return None
    neighbour = grid[1] if best == grid[0] else grid[-2]
    return float(f"{best * best / neighbour:.2g}")


def edge_warning(edges: Mapping[str, tuple[list[float], float]]) -> str | None:
    """The sentence for best rates at the edge of their grids, where there are any: label -> (grid, best rate)."""
    further = {label: beyond(rates, best) for label, (rates, best) in edges.items()}
    told = [
        f"{label} {best:g} (the {'largest' if best == max(rates) else 'smallest'}; next {further[label]:g})"
        for label, (rates, best) in edges.items()
        if further[label] is not None
    ]
    if not told:
        return None
    return (
        f"the best learning rate of {len(told)} of {len(edges)} methods is at the edge of those tried, so a better one may lie beyond; "
        f"--extend_grid tries the next too: {', '.join(told)}"
    )


def extend(definition: dict[str, Any], runs: Bodies) -> list[str]:
    """Add a rate beyond each edge at which a best one stands, in place; says which."""
    said = []
    for label, arm in definition["arms"].items():
        done = all(
            runs.get(key_of(label, rate, seed), {}).get("status") in ("done", "diverged")
            for rate in arm["rates"]
            for seed in searched(definition)
        )
        best = choose(definition, label, runs) if done else None
        further = beyond(arm["rates"], best) if best is not None else None
        if further is not None and arm["extended"] < EXTENSIONS:
            arm["rates"] = sorted([*arm["rates"], further])
            arm["extended"] += 1
            said.append(f"{label}: the best rate {best:g} is at the edge of its grid, so {further:g} is tried too")
    return said


def count_left(
    definition: Mapping[str, Any], runs: Bodies, tests: Bodies, given_up: set[str]
) -> dict[str, tuple[int, int]]:
    """(runs, measurements on test) that are left of each method; those of its best rate are counted before it is known."""
    left = {}
    for label, arm in definition["arms"].items():
        grid = {key_of(label, rate, seed) for rate in arm["rates"] for seed in searched(definition)}
        open_grid = {
            key for key in grid if key not in given_up and runs.get(key, {}).get("status") not in ("done", "diverged")
        }
        seeds = definition["seeds"]
        if open_grid:
            left[label] = (len(open_grid) + len(seeds) - len(searched(definition)), len(seeds))
            continue
        chosen = choose(definition, label, runs)
        keys = [key_of(label, chosen, seed) for seed in seeds] if chosen is not None else []
        open_runs = sum(
            key not in given_up and runs.get(key, {}).get("status") not in ("done", "diverged") for key in keys
        )
        useless = sum(
            key in given_up or f"test {key}" in given_up or runs.get(key, {}).get("status") == "diverged"
            for key in keys
        )
        left[label] = (open_runs, len(keys) - useless - sum(key in tests for key in keys))
    return left
