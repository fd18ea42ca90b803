"""The report of a comparison, rebuilt from its results at any time: one HTML page, plots, tables as CSV, and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loratory.compare.figures import COSTS, figures, interval_words, mean_cost
from loratory.compare.outcome import Comparison, Run
from loratory.compare.statistics import (
    Difference,
    Estimate,
    Pair,
    Standing,
    differences,
    mean_is_headline,
    ranked,
    scores,
    standings,
)
from loratory.compare.told import LEAST_P, opening, places, plural, verdict_text
from loratory.report.page import Cell, document, picture, table, warning
from loratory.report.plots import embedded, written
from loratory.store.atomic import write_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, MARKDOWN, PLOTS = "index.html", "report.md", "plots"
EXAMPLES = 8  # test rows shown on each side
PER_RUN = ("output_dir", "seed", "learning_rate")  # settings that differ from run to run
NO_PLOTS = "The plots are left out, because matplotlib is not installed; run: pip install 'loratory[report]', then build the report again."
Head = Sequence[str]
Rows = list[list[Any]]


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write the report's files into the folder, and return the page, which is the one to read first."""
    rows = standings(comparison)
    against = differences(comparison, comparison.baseline)
    order = ranked(comparison, rows)
    best = differences(comparison, order[0].method) if order else []
    told = opening(comparison, rows, against, best)
    try:
        drawn = figures(comparison, rows, against)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        drawn = {}
    notes = list(comparison.warnings) + ([] if drawn or not order else [NO_PLOTS])
    files = {f"{name}.{kind}": written(figure, kind) for name, (figure, _) in drawn.items() for kind in ("svg", "png")}
    folder.mkdir(parents=True, exist_ok=True)
    if files:
        write_files(folder / PLOTS, files)
    head, cells = method_rows(comparison, rows, against)
    texts = {
        "methods.csv": as_csv(head, [[plain(cell) for cell in line] for line in cells]),
        "differences.csv": as_csv(*difference_rows(against, best)),
        "runs.csv": as_csv(*run_rows(comparison)),
        "examples.csv": as_csv(*example_rows(comparison)),
        MARKDOWN: markdown(comparison, rows, against, told, notes, drawn),
        PAGE: page(comparison, rows, against, told, notes, drawn),
    }
    here = f"{folder.resolve()}/"  # files may be passed on: where they were made is nobody's concern
    write_files(folder, {name: text.replace(here, "").encode() for name, text in texts.items()})
    return folder / PAGE


def page(
    comparison: Comparison,
    rows: Sequence[Standing],
    against: Sequence[Difference],
    told: Sequence[str],
    notes: Sequence[str],
    drawn: Mapping[str, tuple[Figure, str]],
) -> str:
    """The whole page."""
    head, cells = shown_rows(comparison, rows, against)
    parts = [
        f"<h1>{escape(comparison.name)}: {plural(len(comparison.methods), 'method')} compared</h1>",
        f"<p><strong>{escape(told[0])}</strong> {escape(' '.join(told[1:]))}</p>",
        *(warning(note) for note in notes),
        f'<p class="about">{escape(about(comparison))}</p>',
        "<h2>All methods</h2>",
        table(
            head,
            cells,
            numbers=[i for i in range(1, len(head)) if head[i] != "real?"],
            whole=[head.index("real?")],
            sortable=True,
        ),
        f'<p class="about">{escape(how_read(comparison, rows))} Click a heading to sort.</p>',
    ]
    sections = {
        "Scores": ("scores", "differences"),
        "Quality against cost": ("pareto",),
        "Test rows": ("rows",),
        "Learning curves": ("curves",),
        "Learning rates": ("rates",),
    }
    for heading, which in sections.items():
        chosen = [name for name in which if name in drawn]
        examples = shown_examples(comparison, rows) if heading == "Test rows" else []
        if chosen or examples:
            parts.append(f"<h2>{heading}</h2>")
            parts += [picture(embedded(drawn[name][0]), f"{heading}: {name}", drawn[name][1]) for name in chosen]
            parts += examples
    parts += lost_runs(comparison)
    parts += ["<h2>Settings and versions</h2>", *settings_tables(comparison)]
    return document(f"{comparison.name}: comparison", parts, sortable=True)


# -- words -------------------------------------------------------------------------------------------------------------


def about(comparison: Comparison) -> str:
    """What was compared, under which budget."""
    counts = ", ".join(f"{count:,} {split}" for split, count in comparison.rows.items())
    seeds = ", ".join(map(str, comparison.seeds))
    machine = ", ".join(f"{what} {value}" for what, value in comparison.machine.items())
    return (
        f"Task: {comparison.task}. Base: {short(comparison.base)}. Rows: {counts} (fingerprint {comparison.fingerprint[:12]}). "
        f"Seeds: {seeds}. Equal for all: {budget_text(comparison)}. Each method's learning rate was chosen by its mean on dev; the test rows "
        f"were scored once, at that rate. Begun {comparison.created} on {machine}."
    )


def budget_text(comparison: Comparison) -> str:
    kind, number = comparison.budget.get("kind"), comparison.budget.get("amount")
    if kind is None:
        return "the training settings below, steps included"
    units = {"steps": "training steps", "trained": "trained numbers at most", "memory": "bytes of memory at most",
             "adapter_bytes": "bytes of adapter file at most", "seconds": "seconds of training"}  # fmt: skip
    return f"{number:,.0f} {units.get(kind, kind)}" if number is not None else str(kind)


def how_read(comparison: Comparison, rows: Sequence[Standing]) -> str:
    """How intervals and verdicts were made."""
    measured = [row for row in rows if row.estimate is not None]
    if not measured:
        return "Nothing was measured."
    text = (
        f"Scores: means with {interval_words(row.estimate for row in measured)}. Differences are from {comparison.baseline}, paired over the "
        "same seeds and rows; p is two-sided and corrected by Holm's method over these comparisons; real: p below 0.05. "
        "Intervals are of each difference alone, not corrected."
    )
    best = ranked(comparison, rows)[0].method
    if len(measured) > 2 and best != comparison.baseline:
        text += (
            f" What the first paragraph says of {best} and methods other than {comparison.baseline} is corrected over all pairs of methods, "
            f"since it was the scores that chose {best}; differences.csv has each p, and how many pairs it is corrected over."
        )
    if not mean_is_headline(comparison):
        name = comparison.metric_label.split(" (")[0]
        text += (
            f" Score and difference are means of each test row's own {name}, since rows are what can be paired; the column 'all rows at once' "
            f"has the {name} of all rows together."
        )
    return text


# -- tables ------------------------------------------------------------------------------------------------------------


def shown_rows(
    comparison: Comparison, rows: Sequence[Standing], against: Sequence[Difference]
) -> tuple[list[str], list[list[str | Cell]]]:
    """The sortable table: best first, methods without a score last."""
    by_method = {row.method: row for row in against}
    whole = not mean_is_headline(comparison)
    head = ["method", f"{comparison.metric_label} [95 %]", *(["all rows at once"] if whole else []),
            f"minus {comparison.baseline} [95 %]", "real?", p_name(against), "seeds", "learning rate", "trained numbers", "share of base (%)",
            "peak memory (MiB)", "time (s)", "adapter (bytes)", "steps"]  # fmt: skip
    sign = -1 if comparison.greater_is_better else 1
    order = sorted(rows, key=lambda row: (row.estimate is None, sign * row.estimate.value if row.estimate else 0))
    cells: list[list[str | Cell]] = []
    for row in order:
        pair = by_method.get(row.method)
        costs = [mean_cost(row, value) for value in COSTS.values()]
        total = mean_cost(row, lambda run: run.total)
        share = 100 * costs[0] / total if total and costs[0] is not None else None
        steps = mean_cost(row, lambda run: run.steps)
        rate = Cell(f"{row.rate:g}", row.rate) if row.rate else Cell("-", None)
        cells.append(
            [
                row.method,
                with_interval(row.estimate),
                *([figure(row.headline, 2)] if whole else []),
                Cell("baseline", 0.0)
                if row.method == comparison.baseline
                else with_interval(pair.estimate if pair else None),
                verdict_text(None if row.method == comparison.baseline else pair),
                p_cell(pair.adjusted if pair else None),
                f"{row.estimate.seeds if row.estimate else 0} of {len(comparison.seeds)}",
                rate,
                figure(costs[0]),
                figure(share, 2, "{:.3g}"),
                figure(costs[1]),
                figure(costs[2]),
                figure(costs[3]),
                figure(steps),
            ]
        )
    return head, cells


def with_interval(found: Estimate | None) -> Cell:
    if found is None:
        return Cell("-", None)
    digits = places(found)
    text = f"{found.value:.{digits}f}"
    return Cell(text if found.low is None else f"{text} [{found.low:.{digits}f}, {found.high:.{digits}f}]", found.value)


def figure(value: float | None, digits: int = 0, form: str = "") -> Cell:
    if value is None:
        return Cell("-", None)
    return Cell(form.format(value) if form else f"{value:,.{digits}f}", value)


def p_cell(p: float | None) -> Cell:
    return Cell("-", None) if p is None else Cell(f"{p:.2g}" if p >= LEAST_P else f"<{LEAST_P:g}", p)


def p_name(against: Sequence[Difference]) -> str:
    over = max((row.over for row in against), default=0)
    return f"p (Holm, {over} comparisons)" if over > 1 else "p"


def plain(cell: Any) -> Any:
    return ("" if cell.key is None else cell.key) if isinstance(cell, Cell) else cell


def method_rows(
    comparison: Comparison, rows: Sequence[Standing], against: Sequence[Difference]
) -> tuple[list[str], list[list[Any]]]:
    """The same as plain numbers, intervals in columns of their own."""
    by_method = {row.method: row for row in against}
    head = ["method", "learning_rate", "measured_on", "mean", "low", "high", "standard_error", "degrees_of_freedom", "seeds", "rows",
            "all_rows_at_once", "difference", "difference_low", "difference_high", "p", "p_holm", "p_holm_over", "verdict", "trained_numbers",
            "peak_memory_mib", "seconds", "adapter_bytes"]  # fmt: skip
    cells = []
    for row in rows:
        pair, found = by_method.get(row.method), row.estimate
        parts = (
            [found.value, found.low, found.high, found.error, found.freedom, found.seeds, found.rows]
            if found
            else [None] * 7
        )
        gap = pair.estimate if pair else None
        cells.append(
            [row.method, row.rate, row.on, *parts, row.headline, *((gap.value, gap.low, gap.high) if gap else (None,) * 3),
             *((pair.p, pair.adjusted, pair.over or None, pair.verdict) if pair else (None, None, None, "baseline")),
             *(mean_cost(row, value) for value in COSTS.values())]
        )  # fmt: skip
    return head, cells


def difference_rows(*families: Sequence[Difference]) -> tuple[list[str], Rows]:
    """Differences from the baseline, then those from the best method; each pair once."""
    head = [
        "method",
        "minus",
        "difference",
        "low",
        "high",
        "p",
        "p_holm",
        "p_holm_over",
        "verdict",
        "rows_better",
        "rows_worse",
        "seeds",
        "rows",
    ]
    pairs: dict[Pair, Difference] = {}
    for row in (row for family in families for row in family):
        pairs.setdefault(Pair((row.method, row.against)), row)
    cells = []
    for row in pairs.values():
        found = row.estimate
        parts = [found.value, found.low, found.high] if found else [None] * 3
        ends = [found.seeds, found.rows] if found else [0, 0]
        p = [row.p, row.adjusted, row.over or None]
        cells.append([row.method, row.against, *parts, *p, row.verdict, row.better, row.worse, *ends])
    return head, cells


def run_rows(comparison: Comparison) -> tuple[list[str], Rows]:
    """One line for each run."""
    from loratory.compare.engine import rows

    lines = rows(comparison)
    head = list(dict.fromkeys(key for line in lines for key in line)) or ["method"]
    return head, [[line.get(key) for key in head] for line in lines]


def example_rows(comparison: Comparison) -> tuple[list[str], Rows]:
    """Scores of each test row, by method, seeds averaged."""
    found, on = scores(comparison, comparison.methods)
    tables = {m: np.array(list(t.values())) for m, t in found.items() if t}
    if on != "test" or not tables or next(iter(tables.values())).shape[1] < 2:
        return ["row", "text"], []
    means = {method: each.mean(0) for method, each in tables.items()}
    count = len(next(iter(means.values())))
    texts = comparison.test_texts if comparison.test_texts and len(comparison.test_texts) == count else [""] * count
    return ["row", "text", *means], [[i, texts[i], *(float(mean[i]) for mean in means.values())] for i in range(count)]


def shown_examples(comparison: Comparison, rows: Sequence[Standing]) -> list[str]:
    """The test rows on which the best method and the baseline (or the next) differ most."""
    head, cells = example_rows(comparison)
    order = [row.method for row in ranked(comparison, rows)]
    if not cells or len(order) < 2 or comparison.baseline not in order:
        return []
    method = next(name for name in order if name != comparison.baseline)
    sign = 1 if comparison.greater_is_better else -1
    one, two = head.index(method), head.index(comparison.baseline)
    gains = [(sign * (cells[i][one] - cells[i][two]), i) for i in range(len(cells))]
    better = [i for gain, i in sorted(gains, key=lambda pair: (-pair[0], pair[1])) if gain > 0][:EXAMPLES]
    worse = [i for gain, i in sorted(gains) if gain < 0][:EXAMPLES]
    if not better and not worse:
        return [f"<p>{escape(method)} and {escape(comparison.baseline)} have the same score on every test row.</p>"]
    shown = [
        [str(cells[i][0]), str(cells[i][1]) or "-", f"{cells[i][one]:.4g}", f"{cells[i][two]:.4g}"]
        for i in [*better, *worse]
    ]
    text = (
        f"The {len(better)} test rows on which {method} gains most on {comparison.baseline}, then the {len(worse)} on which it loses most "
        f"({comparison.metric_label}, mean over seeds; examples.csv has all rows):"
    )
    return [f"<p>{escape(text)}</p>", table(["row", "input", method, comparison.baseline], shown, numbers=(0, 2, 3))]


def lost_runs(comparison: Comparison) -> list[str]:
    """Runs that gave no result, with their errors."""
    lost = [run for run in comparison.runs if run.status != "done"]
    if not lost:
        return ["<h2>Runs without a result</h2>", "<p>None: every run that was begun came to its end.</p>"]
    cells = [[run.method, rate_of(run), str(run.seed), run.status, run.error or "-"] for run in lost]
    return [
        "<h2>Runs without a result</h2>",
        f"<p>{len(lost)} of {len(comparison.runs)} runs:</p>",
        table(["method", "learning rate", "seed", "what happened", "error"], cells, numbers=(1, 2)),
    ]


def settings_tables(comparison: Comparison) -> list[str]:
    """What all runs share, what each method has of its own, versions, and the command."""
    first: dict[str, Run] = {}
    for run in comparison.runs:
        first.setdefault(run.method, run)
    every = [{k: v for k, v in run.settings.items() if k not in PER_RUN} for run in first.values()]
    keys = list(dict.fromkeys(key for each in every for key in each))
    shared = (
        {k: every[0][k] for k in keys if all(k in each and each[k] == every[0][k] for each in every)}
        if len(every) > 1
        else {}
    )
    own = []
    for method in comparison.methods:
        settings = first[method].settings if method in first else {}
        rest = {k: v for k, v in settings.items() if k not in shared and k not in PER_RUN}
        note = (comparison.budget.get("methods") or {}).get(method, {}).get("note", "")
        rates = ", ".join(f"{rate:g}" for rate in comparison.rates.get(method, ())) or "-"
        chosen = comparison.chosen.get(method)
        own.append(
            [
                method,
                ", ".join(f"{k} {short(v)}" for k, v in rest.items()) or "-",
                rates,
                f"{chosen:g}" if chosen else "-",
                note or "-",
            ]
        )
    made = [
        ["command", comparison.command or "-"],
        *[[k, v] for k, v in comparison.machine.items()],
        *versions(comparison.runs),
    ]
    parts = [table(["method", "settings of its own", "rates tried", "chosen", "budget"], own)]
    if shared:
        parts += ["<h3>Shared by all</h3>", table(["setting", "value"], [[k, short(v)] for k, v in shared.items()])]
    return [*parts, "<h3>Versions and machine</h3>", table(["what", "value"], made)]


def versions(runs: Iterable[Run]) -> list[list[str]]:
    """Each package's version, all of them where runs were made with several."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for name, version in run.versions.items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return [[name, " and ".join(each)] for name, each in found.items()]


def rate_of(run: Run) -> str:
    return f"{run.learning_rate:g}" if run.learning_rate else "-"


def short(value: Any) -> str:
    """A setting as text; of a whole path its last three parts."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "/".join(Path(text).parts[-3:]) if isinstance(value, str) and Path(value).is_absolute() else text


# -- Markdown and CSV --------------------------------------------------------------------------------------------------


def markdown(
    comparison: Comparison,
    rows: Sequence[Standing],
    against: Sequence[Difference],
    told: Sequence[str],
    notes: Sequence[str],
    drawn: Mapping[str, tuple[Figure, str]],
) -> str:
    """The report as Markdown, for a repository or an issue."""
    head, cells = shown_rows(comparison, rows, against)

    def line(words: Iterable[str]) -> str:
        return "| " + " | ".join(word.replace("|", "\\|").replace("\n", " ") for word in words) + " |"

    lines = [f"# {comparison.name}", "", " ".join(told), "", *(f"- {note}" for note in notes), *([""] if notes else [])]
    lines += [about(comparison), "", line(head), "|" + "---|" * len(head)]
    lines += [line(cell.text if isinstance(cell, Cell) else cell for cell in row) for row in cells]
    lines += ["", how_read(comparison, rows), ""]
    for name, (_, caption) in drawn.items():
        lines += [f"![{name}]({PLOTS}/{name}.svg)", "", caption, ""]
    lost = [run for run in comparison.runs if run.status != "done"]
    lines += [
        f"- {run.method}, learning rate {rate_of(run)}, seed {run.seed}: {run.status}: {run.error}" for run in lost
    ]
    lines += ["" for _ in lost[:1]]
    lines += [f"Command: `{comparison.command}`" if comparison.command else ""]
    return "\n".join(lines).rstrip() + "\n"


def as_csv(head: Head, rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return text.getvalue()
