"""The demo report's plots: every one with its axes, units and n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratory.demo.outcome import Measured, Outcome, interval, places
from loratory.report.plots import GREY, panels, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"LoRA": "#1f6fb4", "DoRA": "#c8641b"}  # all others are grey: what the methods are held against
MARKERS = {"LoRA": "o", "DoRA": "s"}


def bars(outcome: Outcome) -> Figure:
    """Each score of a job: a bar for each arm, with its 95 % interval."""
    job, arms = outcome.job, outcome.arms
    figure, axes = panels(len(job.scores), width=3.6 * len(job.scores) + 0.6, height=3.5)
    for axis, (score, label) in zip(axes, job.scores.items(), strict=True):
        for place, measured in enumerate(arms):
            value, low, high = interval(measured, score)
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axis.bar(
                place,
                value,
                width=0.62,
                color=colour(measured),
                yerr=error,
                capsize=5,
                error_kw={"ecolor": "#222222", "lw": 1.3},
            )
            axis.annotate(
                f"{value:.{places(job)}f}",
                (place, max(value, high)),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
            )
        axis.set_xticks(range(len(arms)), [measured.arm.label for measured in arms])
        axis.set_xlim(-0.6, max(len(arms), 2) - 0.4)
        axis.set_ylabel(label)
        highest = max(max(interval(measured, score)[2], measured.metrics[score]) for measured in arms)
        axis.set_ylim(0, 1.18 * highest if highest > 0 else 1)
        title(axis, f"n = {outcome.rows.get('test', 0):,} test rows, 95 % intervals")
    return figure


def curves(outcome: Outcome) -> Figure:
    """Training loss, and score on dev, by step."""
    job, arms = outcome.job, [measured for measured in outcome.arms if measured.loss]
    figure, (left, right) = panels(2, width=7.8, height=3.3)
    for measured in arms:
        for axis, points in ((left, measured.loss), (right, measured.dev)):
            line = {"color": colour(measured), "marker": MARKERS.get(measured.arm.label, "^"), "ms": 4, "lw": 1.6}
            axis.plot([step for step, _ in points], [value for _, value in points], label=measured.arm.label, **line)
    for axis in (left, right):
        axis.set_xlabel(f"step ({job.batch} rows each)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
        axis.margins(y=0.12)
        axis.legend(frameon=False)
    left.set_ylabel("training loss (nats)")
    right.set_ylabel(job.dev_score[1])
    seen = job.batch * max((measured.steps for measured in arms), default=0)
    title(left, f"n = {seen:,} training rows seen by each")
    title(right, f"n = {outcome.rows.get('dev', 0):,} dev rows")
    return figure


def costs(outcomes: Sequence[Outcome]) -> Figure:
    """Trained numbers and peak memory of every training run."""
    runs = [(outcome.job, measured) for outcome in outcomes for measured in outcome.arms if measured.trained]
    figure, (left, right) = panels(2, width=9.4, height=1.1 + 0.36 * len(runs))
    names = [f"{job.name}: {measured.arm.label}" for job, measured in runs]
    for place, (_, measured) in enumerate(runs):
        left.barh(place, measured.trained, color=colour(measured), height=0.66)
        note(left, measured.trained, place, f"{measured.trained:,}")
        memory = (measured.peak_memory or 0) / 2**20
        right.barh(place, memory, color=colour(measured), height=0.66)
        note(right, memory, place, f"{memory:,.0f}" if measured.peak_memory else "not known")
    left.set_xscale("log")
    left.set_xlim(min(m.trained for _, m in runs) / 4, max(m.trained for _, m in runs) * 40)
    right.set_xlim(0, 1.25 * max([(m.peak_memory or 0) / 2**20 for _, m in runs] + [1.0]))
    for axis, label in (
        (left, "trained numbers (count, log scale)"),
        (right, "peak memory of the process while training (MiB)"),
    ):
        axis.set_yticks(range(len(runs)), names)
        axis.invert_yaxis()
        axis.set_xlabel(label)
        title(axis, f"n = {len(runs)} training runs, one each")
    right.set_yticklabels([])
    return figure


def colour(measured: Measured) -> str:
    return COLOURS.get(measured.arm.label, GREY)


def note(axis: Any, value: float, place: int, text: str) -> None:
    axis.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
