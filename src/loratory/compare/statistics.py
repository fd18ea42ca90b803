"""How sure a comparison is: means with intervals, paired differences, and which of them are more than chance.

Scores form a table, seeds x test rows, with the same rows under every seed. Chance comes from both: other seeds would train other
models, other rows would ask other questions. The variance of the table's mean is

    V = Vrow + max(Vseed - Vcell, 0)      Vrow, Vseed: of the means over seeds, over rows      Vcell: what both of them hold

Intervals are those of a bootstrap: rows are resampled, and seeds, too few for that, have their deviations multiplied by normal draws
and shrunk by Vcell. Both are stretched by Student's t with Satterthwaite's degrees of freedom over the normal: plain percentiles would
be too narrow for three seeds. Differences are taken row by row and seed by seed before that.

Each pair of methods is judged once. With k methods, Holm's correction is over

    k - 1 pairs           for a pair with the baseline, which was named before there were scores
    k (k - 1) / 2 pairs   for any other: the scores say which method is best, so any pair may come to be told of

so that among the first, and among the others, the chance of any false difference is at most 5 %.
Source: Cameron, Gelbach and Miller 2011 (two-way variance, multiplier bootstrap); Hesterberg 2015 (stretched percentiles); Holm 1979.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loratory.compare.outcome import Comparison, Run

DRAWS = 4000
LEVEL = 0.95
AT_ONCE = 250  # bootstrap draws that are held in memory together
Table = NDArray[np.float64]  # seeds x rows
Pair = frozenset[str]  # two methods
Verdict = Literal["better", "worse", "not shown", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval, in the shown unit. One seed and no rows give no interval: low and high are None."""

    value: float
    low: float | None
    high: float | None
    error: float | None  # standard error
    freedom: float | None  # degrees of freedom of the error
    seeds: int
    rows: int  # 1: scores of single rows are not known


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method minus another one, paired over their common seeds and rows, in the shown unit."""

    method: str
    against: str
    estimate: Estimate | None  # None: nothing that both have
    p: float | None  # two-sided, of no difference
    adjusted: float | None  # the same after Holm's correction; the verdict is from it
    over: int  # pairs that it is corrected over; 0 without a p
    verdict: Verdict
    better: int  # rows on which the method is better, seeds averaged
    worse: int


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a method came to at its chosen rate."""

    method: str
    rate: float | None  # None: no rate finished, or nothing is trained
    on: Literal["test", "dev", "nothing"]
    estimate: Estimate | None
    headline: (
        float | None
    )  # the metric over all rows at once, mean over seeds: the mean of row scores only for some metrics
    runs: tuple[Run, ...]  # at the chosen rate, finished
    lost: int  # wanted seeds without a score


# -- estimates ---------------------------------------------------------------------------------------------------------


def estimate(table: Table, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of a table, seeds x rows, with its interval. Raises ValueError for an empty one, or a score that is no number."""
    table = np.asarray(table, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"scores have shape {table.shape}; they must be seeds x rows, with at least one of each")
    if not np.isfinite(table).all():
        raise ValueError("a score is no finite number; runs that diverged have no place in a mean")
    seeds, rows = table.shape
    value = float(table.mean())
    variance, freedom, keep = spread(table)
    if seeds == 1 and rows == 1:
        return Estimate(value=value, low=None, high=None, error=None, freedom=None, seeds=1, rows=1)
    generator = np.random.default_rng(seed)
    parts = np.zeros(draws)
    if rows > 1:
        parts += (resampled(table.mean(0), draws, generator) - value) * math.sqrt(rows / (rows - 1))
    if seeds > 1:
        deviations = (table.mean(1) - value) / math.sqrt(seeds * (seeds - 1))
        parts += generator.normal(size=(draws, seeds)) @ deviations * keep
    ends = np.quantile(parts, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) * stretch(freedom)
    low, high = (float(value + end) for end in ends)
    return Estimate(value=value, low=low, high=high, error=math.sqrt(variance), freedom=freedom, seeds=seeds, rows=rows)


def spread(table: Table) -> tuple[float, float, float]:
    """(variance of the mean, its degrees of freedom, share of the seeds' deviations that is not the rows' own)."""
    seeds, rows = table.shape
    by_row, by_seed = table.mean(0), table.mean(1)
    of_rows = float(by_row.var(ddof=1) / rows) if rows > 1 else 0.0
    of_seeds = float(by_seed.var(ddof=1) / seeds) if seeds > 1 else 0.0
    own = 0.0
    if seeds > 1 and rows > 1:
        rest = table - by_row - by_seed[:, None] + table.mean()
        own = float((rest**2).sum() / ((seeds - 1) * (rows - 1)) / (seeds * rows))
    kept = max(of_seeds - own, 0.0)
    variance = of_rows + kept
    uncertainty = (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0) + (of_rows**2 / (rows - 1) if rows > 1 else 0.0)
    freedom = variance**2 / uncertainty if uncertainty > 0 else float(max(seeds, rows) - 1)
    return variance, freedom, math.sqrt(kept / of_seeds) if of_seeds > 0 else 0.0


def resampled(values: NDArray[np.float64], draws: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Means of as many values drawn with replacement, `draws` times."""
    means = np.empty(draws)
    for start in range(0, draws, AT_ONCE):
        part = means[start : start + AT_ONCE]
        part[:] = values[generator.integers(len(values), size=(len(part), len(values)))].mean(1)
    return means


def stretch(freedom: float) -> float:
    """How much wider Student's interval is than the normal one."""
    from scipy.stats import norm, t

    return float(t.ppf((1 + LEVEL) / 2, freedom) / norm.ppf((1 + LEVEL) / 2))


def p_value(found: Estimate) -> float | None:
    """Two-sided p of a mean of 0, by Student's t; with no spread at all, that of a sign test. None without an interval."""
    from scipy.stats import t

    if found.error is None or found.freedom is None:
        return None
    if found.value == 0:
        return 1.0
    if found.error <= 1e-12 * abs(found.value):
        return float(2.0 ** (1 - max(found.seeds, found.rows)))
    return float(2 * t.sf(abs(found.value) / found.error, found.freedom))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: each at most the level keeps the chance of any false one at that level."""
    adjusted = [0.0] * len(values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        adjusted[index] = largest
    return adjusted


# -- over a comparison -------------------------------------------------------------------------------------------------


def chosen_runs(comparison: Comparison, method: str) -> list[Run]:
    """The finished runs of a method at the rate that was chosen on dev, in the order of the seeds."""
    rate = comparison.chosen.get(method)
    runs = [
        run for run in comparison.runs if run.method == method and run.learning_rate == rate and run.status == "done"
    ]
    return sorted(runs, key=lambda run: comparison.seeds.index(run.seed))


def by_rows(comparison: Comparison, runs: Sequence[Run]) -> bool:
    """Whether all of the runs have scores of single test rows, equally many."""
    counts = {len(run.test_each) if run.test_each else 0 for run in runs}
    return len(counts) == 1 and 0 not in counts


def scores(comparison: Comparison, methods: Sequence[str]) -> tuple[dict[str, dict[int, list[float]]], str]:
    """({method: {seed: scores of its rows, or its one score}}, where they were measured), alike for all methods.

    Test rows where every run with a test score has them; else the test score of each run; else the score on dev.
    """
    runs = {method: chosen_runs(comparison, method) for method in methods}
    tested = {
        m: [run for run in found if run.test is not None and comparison.metric in run.test] for m, found in runs.items()
    }
    scale = comparison.metric_scale
    if every := [run for found in tested.values() for run in found]:
        if by_rows(comparison, every):
            return {
                m: {r.seed: [scale * v for v in r.test_each or ()] for r in found} for m, found in tested.items()
            }, "test"
        return {
            m: {r.seed: [scale * (r.test or {})[comparison.metric]] for r in found} for m, found in tested.items()
        }, "test"
    on_dev = {
        m: {r.seed: [scale * r.dev[comparison.metric]] for r in found if comparison.metric in r.dev}
        for m, found in runs.items()
    }
    return on_dev, "dev" if any(on_dev.values()) else "nothing"


def standings(comparison: Comparison) -> list[Standing]:
    """Every method, in the comparison's order."""
    found, on = scores(comparison, comparison.methods)
    rows = []
    for method in comparison.methods:
        table = found[method]
        runs = chosen_runs(comparison, method)
        whole = [run.test[comparison.metric] for run in runs if run.test is not None and comparison.metric in run.test]
        if on == "dev":
            whole = [run.dev[comparison.metric] for run in runs if comparison.metric in run.dev]
        rows.append(
            Standing(
                method=method,
                rate=comparison.chosen.get(method) or None,
                on="test" if table and on == "test" else "dev" if table else "nothing",
                estimate=within(estimate(np.array(list(table.values()))), comparison) if table else None,
                headline=comparison.metric_scale * float(np.mean(whole)) if whole else None,
                runs=tuple(runs),
                lost=len(comparison.seeds) - len(table),
            )
        )
    return rows


def within(found: Estimate, comparison: Comparison) -> Estimate:
    """The interval without what no score can be: below 0, or above 100 of 100."""
    if found.low is None or found.high is None or found.value < 0:
        return found
    most = 100.0 if "(%)" in comparison.metric_label or "to 100" in comparison.metric_label else math.inf
    return replace(found, low=max(found.low, 0.0), high=min(found.high, max(most, found.value)))


def ranked(comparison: Comparison, rows: Sequence[Standing]) -> list[Standing]:
    """The measured methods, best first."""
    sign = -1 if comparison.greater_is_better else 1
    return sorted((row for row in rows if row.estimate is not None), key=lambda row: sign * mean_of(row))


def mean_of(row: Standing) -> float:
    return row.estimate.value if row.estimate is not None else math.nan


def differences(comparison: Comparison, against: str) -> list[Difference]:
    """Every other method minus `against`. What is said of a pair is the same, whichever of its two methods is `against`."""
    found, _ = scores(comparison, comparison.methods)
    judged = corrected(p_values(comparison.methods, found), comparison.baseline)
    rows = []
    for method in comparison.methods:
        if method == against:
            continue
        row = difference(comparison, method, against, found)
        if (pair := Pair((method, against))) in judged:
            adjusted, over = judged[pair]
            row = replace(row, adjusted=adjusted, over=over, verdict=judge(comparison, row, adjusted))
        rows.append(row)
    return rows


def p_values(methods: Sequence[str], found: Mapping[str, Mapping[int, list[float]]]) -> dict[Pair, float]:
    """Of every pair that has one, not yet corrected."""
    values = {}
    for first, second in combinations(methods, 2):
        table = paired(found[first], found[second])
        value = p_value(estimate(table, draws=1)) if table is not None else None  # p needs no draws
        if value is not None:
            values[Pair((first, second))] = value
    return values


def corrected(values: Mapping[Pair, float], baseline: str) -> dict[Pair, tuple[float, int]]:
    """{pair: (Holm's p, pairs that it is corrected over)}: those with the baseline over themselves, the others over all."""
    found = {}
    for family in (values, {pair: p for pair, p in values.items() if baseline in pair}):
        adjusted = holm(list(family.values()))
        found.update({pair: (p, len(family)) for pair, p in zip(family, adjusted, strict=True)})
    return found


def difference(
    comparison: Comparison, method: str, against: str, found: Mapping[str, Mapping[int, list[float]]]
) -> Difference:
    """One pair, over the seeds that both have; not yet corrected."""
    table = paired(found[method], found[against])
    if table is None:
        return Difference(
            method=method,
            against=against,
            estimate=None,
            p=None,
            adjusted=None,
            over=0,
            verdict="not measured",
            better=0,
            worse=0,
        )
    each = table.mean(0) * (1 if comparison.greater_is_better else -1)
    by_row = table.shape[1] > 1
    result = estimate(table)
    return Difference(
        method=method,
        against=against,
        estimate=result,
        p=p_value(result),
        adjusted=None,
        over=0,
        verdict="not shown",
        better=int((each > 0).sum()) if by_row else 0,
        worse=int((each < 0).sum()) if by_row else 0,
    )


def paired(first: Mapping[int, list[float]], second: Mapping[int, list[float]]) -> Table | None:
    """First minus second over their common seeds; None without any."""
    common = [seed for seed in first if seed in second]
    return np.array([np.subtract(first[seed], second[seed]) for seed in common]) if common else None


def judge(comparison: Comparison, row: Difference, adjusted: float) -> Verdict:
    """Whether a difference is more than chance, at 5 % for all pairs together that p is corrected over."""
    if row.estimate is None:
        return "not measured"
    if adjusted >= 1 - LEVEL:
        return "not shown"
    return "better" if (row.estimate.value > 0) == comparison.greater_is_better else "worse"


def mean_is_headline(comparison: Comparison) -> bool:
    """Whether the metric over all test rows is the mean of the rows' own scores (accuracy is; F1, BLEU and loss a token are not)."""
    for run in comparison.runs:
        if run.test is not None and run.test_each and comparison.metric in run.test:
            whole, mean = run.test[comparison.metric], float(np.mean(run.test_each))
            if abs(whole - mean) > 1e-3 * max(abs(whole), 1e-12):  # stored figures are rounded
                return False
    return True
