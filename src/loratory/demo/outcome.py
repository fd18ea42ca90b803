"""What the demo found out, as plain values: the report, results.json and the sentences are made from these alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loratory.demo.plan import Arm, Job

Points = list[tuple[int, float]]  # (step, value)
START = {"before": "the untouched model", "head only": "a head trained alone"}  # first arms, in words


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One arm, trained and measured."""

    arm: Arm
    metrics: dict[str, float]  # on the test rows, each with _low and _high
    answers: list[str]  # to the examples
    trained: int = 0  # numbers
    total: int = 0  # numbers of the base
    steps: int = 0
    seconds: float = 0.0  # of training, evaluations on dev included
    peak_memory: int | None = None  # bytes while training; None: not trained
    loss: Points = field(default_factory=list)
    dev: Points = field(default_factory=list)
    merge_error: float | None = None  # largest change of an output by merging, over the outputs' range


@dataclass
class Outcome:
    """One job, as far as it has come."""

    job: Job
    rows: dict[str, int] = field(default_factory=dict)  # train, dev, test: rows used; test_all: rows there are
    examples: list[tuple[str, str]] = field(default_factory=list)  # (what goes in, what is right)
    arms: list[Measured] = field(default_factory=list)


def interval(measured: Measured, score: str) -> tuple[float, float, float]:
    """Value, low and high end of the 95 % interval."""
    metrics = measured.metrics
    return metrics[score], metrics[f"{score}_low"], metrics[f"{score}_high"]


def places(job: Job) -> int:
    """Decimals to show: scores run to 100 or to 1."""
    return 1 if job.task == "chat" else 3


def shown(measured: Measured, score: str, decimals: int) -> str:
    """A value with its interval: 47.5 [43.1, 51.9]."""
    value, low, high = interval(measured, score)
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def apart(first: Measured, second: Measured, score: str) -> bool:
    """Whether the two intervals share no value."""
    _, low, high = interval(first, score)
    _, other_low, other_high = interval(second, score)
    return other_low > high or low > other_high


def beats(outcome: Outcome, measured: Measured) -> bool:
    """Whether an arm is better than the first one, and their intervals share no value."""
    start, score = outcome.arms[0], outcome.job.headline
    return apart(start, measured, score) and interval(measured, score)[0] > interval(start, score)[0]


def verdict(outcomes: Sequence[Outcome]) -> str:
    """All jobs in one or two sentences."""
    pairs = [(outcome, measured) for outcome in outcomes for measured in outcome.arms[1:]]
    if not pairs:
        return "No adapter was measured, so nothing can be said about gains."
    won = [pair for pair in pairs if beats(*pair)]
    names = sorted({measured.arm.label for _, measured in pairs}, reverse=True)
    against = " or ".join(dict.fromkeys(START[outcome.arms[0].arm.label] for outcome, _ in pairs))
    if len(won) == len(pairs):
        return f"{' and '.join(names)} gained on {against} in every task, and no interval overlaps the one that it is held against."
    lost = "; ".join(
        f"{measured.arm.label} in '{outcome.job.title}'" for outcome, measured in pairs if not beats(outcome, measured)
    )
    return f"In {len(won)} of {len(pairs)} comparisons with {against} the adapter gained and the intervals do not overlap; not so: {lost}."


def sentence(outcome: Outcome) -> str:
    """What one job came to, in plain words."""
    job, arms = outcome.job, outcome.arms
    if not arms:
        return f"{job.title}: not measured."
    name, decimals = job.scores[job.headline].split(" (")[0], places(job)
    text = f"{job.title} ({name}, {outcome.rows.get('test', 0):,} test rows): {arms[0].arm.label} {shown(arms[0], job.headline, decimals)}"
    text += "".join(f"; {each.arm.label} {shown(each, job.headline, decimals)}" for each in arms[1:]) + "."
    start = interval(arms[0], job.headline)[0]
    for each in arms[1:]:
        gain = interval(each, job.headline)[0] - start
        text += f" {each.arm.label} {'gained' if gain >= 0 else 'lost'} {abs(gain):.{decimals}f}, and its interval "
        text += (
            f"{'does not overlap' if apart(arms[0], each, job.headline) else 'overlaps'} that of {arms[0].arm.label}."
        )
    if len(arms) > 2:
        one, two = arms[-2], arms[-1]
        names = f"The intervals of {one.arm.label} and {two.arm.label}"
        text += (
            f" {names} do not overlap."
            if apart(one, two, job.headline)
            else f" {names} overlap: this run does not say which is better."
        )
    return text


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything of one job, as JSON values."""
    job = outcome.job
    return {
        "name": job.name,
        "title": job.title,
        "base": job.base,
        "data": job.data,
        "task": job.task,
        "task_options": job.task_options,
        "rows": outcome.rows,
        "steps": job.steps,
        "batch": job.batch,
        "scores": job.scores,
        "examples": [{"input": given, "expected": right} for given, right in outcome.examples],
        "arms": [
            {
                "label": each.arm.label,
                "method": each.arm.method,
                "learning_rate": each.arm.learning_rate or None,
                "options": each.arm.options,
                "metrics": each.metrics,
                "trained": each.trained,
                "total": each.total,
                "steps": each.steps,
                "seconds": round(each.seconds, 1),
                "peak_memory_bytes": each.peak_memory,
                "loss": each.loss,
                "dev": each.dev,
                "merge_error": each.merge_error,
                "answers": each.answers,
            }
            for each in outcome.arms
        ],
    }
