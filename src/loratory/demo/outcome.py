"""What the demo found out, as plain values: the report, results.json and the sentences are made from these alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loratory.demo.plan import Arm, Job

Points = list[tuple[int, float]]  # (step, value)


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


def sentence(outcome: Outcome) -> str:
    """What one job came to, in plain words."""
    job, arms = outcome.job, outcome.arms
    if not arms:
        return f"{job.title}: not measured."
    name = job.scores[job.headline].split(" (")[0]
    start, decimals = arms[0], places(job)
    first = f"{start.arm.label} {shown(start, job.headline, decimals)}"
    parts = []
    for measured in arms[1:]:
        better = interval(measured, job.headline)[0] - interval(start, job.headline)[0]
        verdict = "the intervals do not overlap" if apart(start, measured, job.headline) else "the intervals overlap"
        word = "gained" if better >= 0 else "lost"
        parts.append(
            f"{measured.arm.label} {shown(measured, job.headline, decimals)} ({word} {abs(better):.{decimals}f}; {verdict})"
        )
    text = f"{job.title}, {name} on {outcome.rows.get('test', 0)} held-out rows: " + "; ".join([first, *parts]) + "."
    if len(arms) > 2:
        one, two = arms[-2], arms[-1]
        names = f"The intervals of {one.arm.label} and {two.arm.label}"
        text += (
            f" {names} do not overlap."
            if apart(one, two, job.headline)
            else f" {names} overlap, so this run does not say which is better."
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
