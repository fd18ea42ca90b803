"""The plots of a comparison: each says its axes, units, n and what its intervals are."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loratory.compare.choice import beyond
from loratory.compare.outcome import Comparison, Run
from loratory.compare.statistics import Difference, Estimate, Standing, chosen_runs, ranked
from loratory.compare.told import places, plural
from loratory.report.plots import GREY, panels, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1f6fb4", "#c8641b", "#2a8f4f", "#b3306e", "#7d5bb5", "#8a6d00", "#0f8b8d", "#c23b22", "#4d5a9c", "#6b6b6b")  # fmt: skip
MARKERS = "osD^vPX<>*"
MIB = 2**20
Value = Callable[[Run], float | None]
COSTS: dict[str, Value] = {  # axis of a Pareto plot -> the run's figure
    "trained numbers (count)": lambda run: run.trained,
    "peak memory (MiB)": lambda run: run.peak_memory / MIB if run.peak_memory else None,
    "time of a training run (s)": lambda run: run.seconds,
    "adapter file (bytes)": lambda run: run.adapter_bytes,
}


def figures(
    comparison: Comparison, rows: Sequence[Standing], against: Sequence[Difference]
) -> dict[str, tuple[Figure, str]]:
    """Every plot that the runs have numbers for: {file name: (figure, what it shows)}."""
    measured = ranked(comparison, rows)
    found: dict[str, tuple[Figure, str]] = {}
    if measured:
        found["scores"] = (
            score_plot(comparison, measured),
            f"Score of each method, best first: {comparison.metric_label}.",
        )
        found["pareto"] = (
            pareto_plot(comparison, measured),
            "Quality against cost; the grey line joins the methods that no other one beats in both. Costs are means over seeds.",
        )
    if any(row.estimate for row in against):
        found["differences"] = (
            difference_plot(comparison, against),
            f"Each method minus {comparison.baseline}. Filled: more than chance (Holm over all that are shown, 5 %). Hollow: not shown.",
        )
    if any(row.better + row.worse for row in against):
        found["rows"] = (
            row_plot(comparison, against),
            f"Share of the test rows on which a method does better or worse than {comparison.baseline}, scores averaged over seeds.",
        )
    if curves := curve_plot(comparison):
        found["curves"] = (curves, "Learning curves at the chosen rates.")
    if any(len(rates) > 1 for rates in comparison.rates.values()) and any(
        run.status == "done" for run in comparison.runs
    ):
        found["rates"] = (
            rate_plot(comparison),
            "Score on dev by learning rate. The ring marks the chosen rate; it is red where that is the edge of the grid, so that a better one "
            "may lie beyond. A cross marks a rate at which a run diverged, failed or was killed.",
        )
    return found


def score_plot(comparison: Comparison, rows: Sequence[Standing]) -> Figure:
    """Means with intervals, best on top."""
    figure, (axis,) = panels(1, width=7.8, height=1.3 + 0.42 * len(rows))
    for place, row in enumerate(rows):
        dot(axis, comparison, row.method, row.estimate, place)
    names(axis, [row.method for row in rows])
    axis.set_xlabel(shown_metric(comparison, rows))
    axis.grid(axis="x", alpha=0.25)
    title(axis, f"n = {count_of(rows)}; {interval_words(row.estimate for row in rows)}")
    return figure


def difference_plot(comparison: Comparison, rows: Sequence[Difference]) -> Figure:
    """Differences from the baseline with their intervals."""
    rows = best_first(comparison, rows)
    figure, (axis,) = panels(1, width=7.8, height=1.3 + 0.42 * len(rows))
    axis.axvline(0, color="#222222", lw=1)
    for place, row in enumerate(rows):
        dot(axis, comparison, row.method, row.estimate, place, filled=row.verdict in ("better", "worse"))
    names(axis, [row.method for row in rows])
    better = "more" if comparison.greater_is_better else "less"
    axis.set_xlabel(f"difference from {shortened(comparison.baseline)}: {comparison.metric_label}, {better} is better")
    axis.grid(axis="x", alpha=0.25)
    title(axis, f"n = {count_of(rows)}, paired; {interval_words(row.estimate for row in rows)}")
    return figure


def pareto_plot(comparison: Comparison, rows: Sequence[Standing]) -> Figure:
    """Quality against trained numbers, memory, time and bytes."""
    from matplotlib.lines import Line2D

    figure, axes = panels(
        4, width=9.0, height=7.0 + 0.22 * math.ceil(len(rows) / legend_columns(comparison.methods)), rows=2
    )
    for axis, (label, value) in zip(axes, COSTS.items(), strict=True):
        points = [
            (cost, row) for row in rows if (cost := mean_cost(row, value)) is not None and row.estimate is not None
        ]
        zeros = [row for cost, row in points if cost <= 0]
        points = [(cost, row) for cost, row in points if cost > 0]
        if points and max(cost for cost, _ in points) > 20 * min(cost for cost, _ in points):
            axis.set_xscale("log")
            label = label.replace(")", ", log scale)")
        else:
            axis.locator_params(
                axis="x", nbins=3 if points and max(cost for cost, _ in points) >= 1e6 else 5
            )  # 40,000,000 is wide
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        front(axis, comparison, points)
        for cost, row in points:
            line = style(comparison, row.method)
            value_, lower, upper = ends(row.estimate)
            axis.errorbar(
                cost, value_, yerr=[[value_ - lower], [upper - value_]], capsize=3, ms=7, lw=1.2, ls="none", **line
            )
        for row in zeros:
            axis.axhline(ends(row.estimate)[0], color=style(comparison, row.method)["color"], lw=1.2, ls=":")
        if zeros:
            axis.annotate(
                "dotted: none of it",
                (0.99, 0.01),
                xycoords="axes fraction",
                fontsize=8,
                color="#555555",
                ha="right",
                va="bottom",
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.margins(x=0.1, y=0.1)
        if not points:
            axis.annotate("not known", (0.5, 0.5), xycoords="axes fraction", ha="center", color="#555555")
    for axis in axes[::2]:
        axis.set_ylabel(shown_metric(comparison, rows))
    handles = [
        Line2D([], [], ls="none", ms=7, label=wrapped(row.method), **style(comparison, row.method)) for row in rows
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=legend_columns(comparison.methods), frameon=False, fontsize=8
    )
    figure.suptitle(f"n = {count_of(rows)}; {interval_words(row.estimate for row in rows)}", fontsize=9)
    return figure


def front(axis: Any, comparison: Comparison, points: Sequence[tuple[float, Standing]]) -> None:
    """The step line under which nothing is gained: cheapest first, each better than all that cost less."""
    sign = 1 if comparison.greater_is_better else -1
    best: list[tuple[float, float]] = []
    for cost, row in sorted(points, key=lambda point: (point[0], -sign * ends(point[1].estimate)[0])):
        value = ends(row.estimate)[0]
        if not best or sign * value > sign * best[-1][1]:
            best.append((cost, value))
    if len(best) > 1:
        axis.step(
            [cost for cost, _ in best],
            [value for _, value in best],
            where="post",
            color=GREY,
            lw=1.4,
            alpha=0.7,
            zorder=0,
        )


def row_plot(comparison: Comparison, rows: Sequence[Difference]) -> Figure:
    """Shares of the test rows that are better and worse than the baseline's."""
    rows = best_first(comparison, rows)
    figure, (axis,) = panels(1, width=7.8, height=1.4 + 0.46 * len(rows))
    for place, row in enumerate(rows):
        count = row.estimate.rows if row.estimate else 1
        for side, number, colour in ((1, row.better, "#1f6fb4"), (-1, row.worse, "#c8641b")):
            share = number / count
            low, high = wilson(number, count)
            error = [[share - low], [high - share]] if side > 0 else [[high - share], [share - low]]
            whiskers = {"ecolor": "#222222", "lw": 1.1, "capsize": 3}
            axis.barh(
                place, side * 100 * share, color=colour, height=0.62, xerr=100 * np.array(error), error_kw=whiskers
            )
            axis.annotate(
                f"{number:,}", (side * 100 * high, place), xytext=(side * 5, 0), textcoords="offset points",
                va="center", ha="left" if side > 0 else "right", fontsize=8,
            )  # fmt: skip
    axis.axvline(0, color="#222222", lw=1)
    names(axis, [row.method for row in rows])
    most = max(100 * wilson(max(row.better, row.worse), row.estimate.rows)[1] for row in rows if row.estimate)
    axis.set_xlim(-1.22 * most, 1.22 * most)
    axis.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axis.set_xlabel(f"test rows (%): worse than {shortened(comparison.baseline)} (left) and better (right)")
    seeds = max(row.estimate.seeds for row in rows if row.estimate)
    title(
        axis,
        f"n = {rows[0].estimate.rows if rows[0].estimate else 0:,} test rows, {plural(seeds, 'seed')}; whiskers: 95 % Wilson intervals over rows",
    )
    return figure


def curve_plot(comparison: Comparison) -> Figure | None:
    """Training loss and score on dev by step, at the chosen rates; None where no method has two points of either."""
    from matplotlib.lines import Line2D

    of_both = {
        "training loss (nats)": ("train", 1.0, lambda run: run.loss_curve),
        f"on dev: {dev_label(comparison)}": ("dev", dev_scale(comparison), lambda run: run.dev_curve),
    }
    drawn = {}
    for what, (split, scale, of) in of_both.items():
        found = {
            m: common_points([of(run) for run in chosen_runs(comparison, m) if of(run)]) for m in comparison.methods
        }
        if any(len(steps) > 1 for steps, _ in found.values()):
            drawn[what] = (split, {m: (steps, scale * values) for m, (steps, values) in found.items() if steps})
    if not drawn:
        return None
    methods = [m for m in comparison.methods if any(m in curves for _, curves in drawn.values())]
    columns = legend_columns(comparison.methods)
    width = 4.5 * len(drawn)
    figure, axes = panels(len(drawn), width=width, height=3.6 + 0.22 * math.ceil(len(methods) / columns))
    for axis, (what, (_, curves)) in zip(axes, drawn.items(), strict=True):
        for method, (steps, values) in curves.items():
            line = style(comparison, method)
            axis.plot(steps, values.mean(0), lw=1.5, ms=4, **line)
            if len(values) > 1:
                axis.fill_between(steps, values.min(0), values.max(0), color=line["color"], alpha=0.13, lw=0)
        axis.set_xlabel("step")
        axis.set_ylabel(what)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25)
    seeds = len(comparison.seeds)
    bands = f"line: mean, band: lowest to highest of {seeds} seeds" if seeds > 1 else "1 seed, so no interval"
    counts = ", ".join(f"{comparison.rows.get(split, 0):,} {split} rows" for split, _ in drawn.values())
    figure.suptitle(f"n = {counts}; {bands}", fontsize=9)
    handles = [Line2D([], [], lw=1.5, ms=4, label=wrapped(method), **style(comparison, method)) for method in methods]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return figure


def rate_plot(comparison: Comparison) -> Figure:
    """Score on dev by learning rate, a panel for each method."""
    methods = [method for method in comparison.methods if comparison.rates.get(method)]
    columns = min(4, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure, axes = panels(
        len(methods), width=max(4.6, 2.35 * columns + 0.6), height=0.8 + 2.1 * rows, rows=rows, sharey=True
    )
    scale = dev_scale(comparison)
    for axis, method in zip(axes, methods, strict=True):
        line = style(comparison, method)
        rates = sorted(comparison.rates[method])
        means: list[tuple[float, float]] = []
        for rate in rates:
            runs = [run for run in comparison.runs if run.method == method and run.learning_rate == rate]
            values = [
                scale * value
                for run in runs
                if run.status == "done" and (value := dev_value(comparison, run)) is not None
            ]
            if values:
                low, high = min(values), max(values)
                mean = float(np.mean(values))
                axis.errorbar(
                    rate, mean, yerr=[[mean - low], [high - mean]], capsize=3, ms=5, lw=1.1, ls="none", **line
                )
                means.append((rate, mean))
            if any(run.status != "done" for run in runs):
                axis.plot(
                    rate, 0.04, "x", color="#c23b22", ms=7, mew=2, transform=axis.get_xaxis_transform(), clip_on=False
                )
        axis.plot([rate for rate, _ in means], [mean for _, mean in means], color=line["color"], lw=1.1)
        best = comparison.chosen.get(method)
        if best is not None and best in dict(means):
            edge = at_edge(comparison, method)
            axis.plot(best, dict(means)[best], "o", mfc="none", mec="#c23b22" if edge else "#222222", ms=12, mew=1.6)
        axis.set_xscale("log")
        axis.set_xlim(rates[0] / 2, rates[-1] * 2)
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=7)
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.25)
        axis.margins(y=0.15)
        title(axis, textwrap.fill(method, 26) + (" (edge of grid)" if at_edge(comparison, method) else ""))
    figure.supxlabel("learning rate (log scale)", fontsize=10)
    figure.supylabel("\n".join(textwrap.wrap(f"on dev: {dev_label(comparison)}", 34)), fontsize=10)
    tried = max(
        (
            len({r.seed for r in comparison.runs if r.method == m and r.learning_rate == rate})
            for m in methods
            for rate in comparison.rates[m]
        ),
        default=0,
    )
    bars = f"whiskers: lowest to highest of {tried} seeds at most" if tried > 1 else "1 seed a rate, so no interval"
    figure.suptitle(f"n = {comparison.rows.get('dev', 0):,} dev rows; {bars}", fontsize=9)
    return figure


# -- parts of them -----------------------------------------------------------------------------------------------------


def style(comparison: Comparison, method: str) -> dict[str, Any]:
    """Colour and marker of a method, the same in every plot."""
    place = comparison.methods.index(method)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[(place + place // len(COLOURS)) % len(MARKERS)],
    }


def dot(
    axis: Any, comparison: Comparison, method: str, found: Estimate | None, place: int, *, filled: bool = True
) -> None:
    """A mean with its interval as a horizontal whisker, and its number above."""
    if found is None:
        return
    value, low, high = ends(found)
    line = style(comparison, method)
    axis.errorbar(
        value, place, xerr=[[value - low], [high - value]], capsize=4, ms=7, lw=1.4, ls="none",
        mfc=line["color"] if filled else "white", **line,
    )  # fmt: skip
    axis.annotate(
        f"{value:.{places(found)}f}", (value, place), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
    )


def names(axis: Any, methods: Sequence[str]) -> None:
    """Methods as labels of the vertical axis, the first on top."""
    axis.set_yticks(range(len(methods)), [wrapped(method) for method in methods])
    axis.set_ylim(len(methods) - 0.4, -0.75)


def best_first(comparison: Comparison, rows: Sequence[Difference]) -> list[Difference]:
    """The measured differences, largest gain first."""
    sign = -1 if comparison.greater_is_better else 1
    return sorted((row for row in rows if row.estimate is not None), key=lambda row: sign * ends(row.estimate)[0])


def ends(found: Estimate | None) -> tuple[float, float, float]:
    """Value, low and high; without an interval both ends are the value."""
    if found is None:
        return math.nan, math.nan, math.nan
    return (
        found.value,
        found.value if found.low is None else found.low,
        found.value if found.high is None else found.high,
    )


def mean_cost(row: Standing, value: Value) -> float | None:
    """A cost, averaged over the runs that know it."""
    known = [cost for run in row.runs if (cost := value(run)) is not None]
    return float(np.mean(known)) if known else None


def common_points(curves: Sequence[Sequence[tuple[int, float]]]) -> tuple[list[int], np.ndarray]:
    """Steps that all curves have, and (curves, steps) values."""
    if not curves:
        return [], np.empty((0, 0))
    tables = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(each) for each in tables)))
    return steps, np.array([[each[step] for step in steps] for each in tables])


def at_edge(comparison: Comparison, method: str) -> bool:
    """Whether the chosen rate is the smallest or the largest of several."""
    chosen = comparison.chosen.get(method)
    return chosen is not None and beyond(comparison.rates.get(method) or [], chosen) is not None


def dev_key(comparison: Comparison) -> str | None:
    """The metric that dev was measured with: the reported one where it is there, else the first that all runs have."""
    done = [run.dev for run in comparison.runs if run.status == "done" and run.dev]
    if not done:
        return None
    shared = [key for key in done[0] if all(key in dev for dev in done)]
    return comparison.metric if comparison.metric in shared else next(iter(shared), None)


def dev_value(comparison: Comparison, run: Run) -> float | None:
    key = dev_key(comparison)
    return run.dev.get(key) if key else None


def dev_scale(comparison: Comparison) -> float:
    return comparison.metric_scale if dev_key(comparison) == comparison.metric else 1.0


def dev_label(comparison: Comparison) -> str:
    key = dev_key(comparison)
    return comparison.metric_label if key in (comparison.metric, None) else str(key)


def shown_metric(comparison: Comparison, rows: Sequence[Standing]) -> str:
    """The score's label, saying so where it is not from test."""
    where = "" if all(row.on == "test" for row in rows) else " on dev"
    return f"{comparison.metric_label}{where}"


def count_of(rows: Iterable[Standing | Difference]) -> str:
    """How many rows and seeds stand behind the estimates."""
    found = [row.estimate for row in rows if row.estimate is not None]
    seeds = sorted({each.seeds for each in found})
    words = plural(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds" if seeds else "0 seeds"
    return f"{found[0].rows:,} test rows x {words}" if found and found[0].rows > 1 else words


def interval_words(found: Iterable[Estimate | None]) -> str:
    """What the intervals stand for."""
    known = [each for each in found if each is not None]
    if all(each.low is None for each in known):
        return "no interval: one seed, and no scores of single rows"
    if all(each.seeds == 1 for each in known):
        return "95 % bootstrap intervals over rows; chance in training is not in them"
    return "95 % bootstrap intervals over seeds" + (" and rows" if any(each.rows > 1 for each in known) else "")


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z, share = 1.959964, hits / count
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)
    return min(low, share), max(high, share)


def legend_columns(methods: Sequence[str]) -> int:
    longest = max(len(line) for method in methods for line in wrapped(method).splitlines())
    return max(1, min(5, 110 // (longest + 6)))


def wrapped(method: str) -> str:
    return textwrap.fill(method, 30)


def shortened(method: str) -> str:
    return textwrap.shorten(method, 30, placeholder=" ...") if " " in method else method[:30]
