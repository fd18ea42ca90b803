"""What a comparison says, in plain words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratory.compare.outcome import Comparison
from loratory.compare.statistics import Difference, Estimate, Standing, ranked

LEAST_P = 1e-4


def opening(
    comparison: Comparison, rows: Sequence[Standing], against: Sequence[Difference], best: Sequence[Difference]
) -> list[str]:
    """Sentences: what won, by how much, whether the difference is real, and what the numbers do not cover.

    against: every method minus the baseline; best: every method minus the best one.
    """
    order = ranked(comparison, rows)
    if not order:
        return ["No method has a score yet, so nothing can be said about which is best."]
    first = order[0]
    where = "test rows" if first.on == "test" else "dev rows (no test score is there)"
    count = comparison.rows.get("test" if first.on == "test" else "dev", 0)
    score = comparison.metric_label.split(" (")[0]
    told = [
        f"{'Best' if len(order) > 1 else 'The only method measured'}: {first.method}, with {score} "
        f"{amount(comparison, first.estimate)} on {count:,} {where}, mean of {seeds_of(first.estimate)}."
    ]
    if len(order) == 1:
        return [*told, *caveats(rows)]
    told += [held_against_baseline(comparison, first, order, against)]
    told += [held_against_others(comparison, first, order, best)]
    told += [others_against_baseline(comparison, first, against)]
    return [*(text for text in told if text), *caveats(rows)]


def held_against_baseline(
    comparison: Comparison, first: Standing, order: Sequence[Standing], against: Sequence[Difference]
) -> str:
    """The best method and the baseline."""
    if first.method == comparison.baseline:
        real = [row.method for row in against if row.verdict == "worse"]
        if not real:
            return "It is the baseline, and no other method is shown to be worse than it: what lies between them may be chance."
        return f"It is the baseline; the difference is real for {listed(real)}, which {'is' if len(real) == 1 else 'are'} worse."
    row = next((each for each in against if each.method == first.method), None)
    if row is None or row.estimate is None:
        return f"The baseline, {comparison.baseline}, has no score to hold it against."
    base = next(each for each in order if each.method == comparison.baseline)
    text = (
        f"That is {gap(comparison, row.estimate)} {'more' if row.estimate.value >= 0 else 'less'} than the baseline, {comparison.baseline} "
        f"({amount(comparison, base.estimate, interval=False)}), and "
    )
    if row.p is None:
        return text + "one seed without scores of single rows cannot say whether that is chance."
    if row.verdict in ("better", "worse"):
        return text + f"the difference is real: {p_text(row)}."
    return text + f"the difference is not shown to be real: {p_text(row)}, so it may be chance."


def held_against_others(
    comparison: Comparison, first: Standing, order: Sequence[Standing], best: Sequence[Difference]
) -> str:
    """The best method and those next to it."""
    pairs = {row.method: row for row in best}
    others = [pairs[row.method] for row in order[1:]]
    close = [row.method for row in others if row.verdict == "not shown"]
    apart = [row.method for row in others if row.verdict == "worse"]
    ahead = [row.method for row in others if row.verdict == "better"]  # on their common seeds, where seeds were lost
    second = others[0]
    if second.method == comparison.baseline and len(apart) == len(others):
        return ""
    told = []
    if second.estimate is not None and second.method != comparison.baseline:
        told.append(
            f"The next, {second.method}, is {gap(comparison, second.estimate)} {side(comparison, second.estimate)} it."
        )
    if len(apart) == len(others):
        return " ".join([*told, f"All others are worse than {first.method} by more than chance."])
    if any(pairs[name].p is not None for name in close):
        told.append(f"Not shown to differ from {first.method}: {listed(close)}.")
    if apart:
        told.append(f"Worse by more than chance: {listed(apart)}.")
    if ahead:
        told.append(f"Better by more than chance on the seeds that both have: {listed(ahead)}.")
    return " ".join(told)


def others_against_baseline(comparison: Comparison, first: Standing, against: Sequence[Difference]) -> str:
    """Methods other than the best that are shown to differ from the baseline."""
    if first.method == comparison.baseline:
        return ""  # said already
    parts = []
    for verdict in ("better", "worse"):
        names = [row.method for row in against if row.verdict == verdict and row.method != first.method]
        if names:
            parts.append(f"{verdict} than {comparison.baseline}: {listed(names)}")
    return f"Of the others, by more than chance {'; '.join(parts)}." if parts else ""


def side(comparison: Comparison, found: Estimate) -> str:
    """Where a method stands to the best: behind, unless seeds were lost and it does better on those that both have."""
    return "ahead of" if found.value * (1 if comparison.greater_is_better else -1) > 0 else "behind"


def caveats(rows: Sequence[Standing]) -> list[str]:
    """What the numbers do not cover."""
    found = []
    measured = [row for row in rows if row.estimate is not None]
    if all(row.estimate is not None and row.estimate.seeds == 1 for row in measured):
        found.append(
            "Every method was trained with one seed, so chance in training is in no interval: another seed may turn the order round."
        )
    if any(row.on == "dev" for row in measured):
        found.append("Scores on dev flatter every method, since its learning rate was chosen there.")
    missing = [row.method for row in rows if row.estimate is None]
    if missing:
        found.append(f"Without a score: {listed(missing)}.")
    fewer = [f"{row.method} ({row.lost} missing)" for row in measured if row.lost]
    if fewer:
        found.append(f"Measured on fewer seeds than asked for: {listed(fewer)}.")
    return found


def verdict_text(row: Difference | None) -> str:
    """One cell of a table."""
    if row is None:
        return "baseline"
    if row.estimate is not None and row.p is None:
        return "cannot be said"
    return {"better": "better, real", "worse": "worse, real", "not shown": "not shown", "not measured": "not measured"}[
        row.verdict
    ]


def amount(comparison: Comparison, found: Estimate | None, *, interval: bool = True) -> str:
    """A score with its unit and interval: 84.2 % [82.1, 86.0]."""
    if found is None:
        return "no score"
    unit = {"%": " %", "0 to 100": ""}.get(
        unit_of(comparison), f" {unit_of(comparison)}" if unit_of(comparison) else ""
    )
    digits = places(found)
    text = f"{found.value:.{digits}f}{unit}"
    return text if found.low is None or not interval else f"{text} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def gap(comparison: Comparison, found: Estimate) -> str:
    """A difference without its sign, with its unit and interval: 1.2 points [0.3, 2.1]."""
    unit = {"%": " points", "0 to 100": " points"}.get(
        unit_of(comparison), f" {unit_of(comparison)}" if unit_of(comparison) else ""
    )
    digits, sign = places(found), math.copysign(1.0, found.value)
    text = f"{abs(found.value):.{digits}f}{unit}"
    if found.low is None or found.high is None:
        return text
    low, high = sorted((sign * found.low, sign * found.high))
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def unit_of(comparison: Comparison) -> str:
    _, opened, rest = comparison.metric_label.partition("(")
    return rest.rstrip(")").strip() if opened else ""


def places(found: Estimate) -> int:
    """Decimals that the interval's width deserves."""
    width = (found.high - found.low) if found.low is not None and found.high is not None else abs(found.value)
    return 2 if width <= 0 else max(1, min(5, 1 - math.floor(math.log10(width))))


def p_text(row: Difference) -> str:
    value = row.adjusted if row.adjusted is not None else 1.0
    text = f"p = {value:.2g}" if value >= LEAST_P else f"p < {LEAST_P:g}"
    return text + (f" after Holm's correction for {row.over} comparisons" if row.over > 1 else "")


def seeds_of(found: Estimate | None) -> str:
    return plural(found.seeds if found is not None else 0, "seed")


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
