"""The demo's report: one HTML file that needs no network, and results.json beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from loratory.demo.figures import bars, costs, curves
from loratory.demo.outcome import Outcome, as_json, places, sentence, shown, verdict
from loratory.demo.plan import DRAWS, SAMPLE_SEED
from loratory.report.page import document, picture, table, warning
from loratory.report.plots import embedded
from loratory.train.folder import write_text

MADE_BY = "loratory demo"


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """How the demo was run."""

    command: str
    seconds: float
    versions: dict[str, str]
    machine: str
    quick: bool = False
    stopped: str = ""  # why it did not come to its end; empty: it did


def write_report(folder: Path, outcomes: Sequence[Outcome], how: Circumstances) -> Path:
    """Write results.json and index.html of what was finished. Returns the path of the page."""
    measured = [outcome for outcome in outcomes if outcome.arms]
    results = {
        "made_by": MADE_BY,
        "is_a_result": not how.quick,
        "command": how.command,
        "stopped": how.stopped or None,
        "seconds": round(how.seconds, 1),
        "machine": how.machine,
        "versions": how.versions,
        "bootstrap_draws": DRAWS,
        "test_sample_seed": SAMPLE_SEED,
        "jobs": [as_json(outcome) for outcome in measured],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "index.html", page(measured, how))
    return folder / "index.html"


def page(outcomes: Sequence[Outcome], how: Circumstances) -> str:
    """The whole page."""
    parts = ["<h1>Loratory demo: two small models, three real tasks</h1>", *warnings(how), opening(outcomes, how)]
    parts += [summary_table(outcomes)]
    for outcome in outcomes:
        parts += section(outcome)
    if any(measured.trained for outcome in outcomes for measured in outcome.arms):
        caption = "What each run trained, and the most memory its process held (Python and its libraries included)."
        parts += [
            "<h2>Cost</h2>",
            picture(embedded(costs(outcomes)), "trained numbers and peak memory of each training run", caption),
        ]
    parts += ["<h2>Settings and versions</h2>", settings_table(outcomes), versions_table(how)]
    return document("Loratory demo", parts)


def warnings(how: Circumstances) -> list[str]:
    found = []
    if how.quick:
        found.append(
            "Smoke run (--quick): two steps and eight test rows a task. It shows that everything runs. Its numbers are not a result."
        )
    if how.stopped:
        found.append(f"Not finished: {how.stopped}. The page holds what had been measured by then.")
    return [warning(text) for text in found]


def opening(outcomes: Sequence[Outcome], how: Circumstances) -> str:
    """The first paragraph: what was gained, and whether the intervals separate; then a line for each task."""
    if how.quick:
        told = "This was a smoke run, so nothing can be said about gains; the lines below only show what a real run writes."
    else:
        told = verdict(outcomes)
    told += (
        " Numbers in brackets are 95 % bootstrap intervals over the test rows. They do not cover chance in training: every run was "
        f"made once, with one seed. All of it took {how.seconds / 60:.1f} minutes on {how.machine}."
    )
    lines = "".join(f"<li>{escape(sentence(outcome))}</li>" for outcome in outcomes)
    return f"<p>{escape(told)}</p>\n<ul>{lines}</ul>"


def summary_table(outcomes: Sequence[Outcome]) -> str:
    head = (
        "task",
        "arm",
        "score on test rows [95 % interval]",
        "n",
        "trained numbers",
        "share of base",
        "steps",
        "training run, s",
        "peak memory, MiB",
    )
    rows = []
    for outcome in outcomes:
        for measured in outcome.arms:
            scores = "\n".join(
                f"{label.split(' (')[0]} {shown(measured, score, places(outcome.job))}"
                for score, label in outcome.job.scores.items()
            )
            memory = f"{measured.peak_memory / 2**20:,.0f}" if measured.peak_memory else "-"
            share = f"{100 * measured.trained / measured.total:.2f} %" if measured.trained else "-"
            trained = f"{measured.trained:,}" if measured.trained else "-"
            ran = (f"{measured.steps}", f"{measured.seconds:.0f}") if measured.trained else ("-", "-")
            rows.append(
                (
                    outcome.job.title,
                    measured.arm.label,
                    scores,
                    str(outcome.rows.get("test", 0)),
                    trained,
                    share,
                    *ran,
                    memory,
                )
            )
    return table(head, rows, numbers=range(3, 9), whole=(1, 2))


def section(outcome: Outcome) -> list[str]:
    job = outcome.job
    about = f"{job.about} Base: {job.base_title}. {outcome.rows.get('test', 0):,} of {outcome.rows.get('test_all', 0):,} test rows, drawn once at random (seed {SAMPLE_SEED})."
    parts = [f"<h2>{escape(job.title)}</h2>", f'<p class="about">{escape(about)}</p>']
    parts.append(
        picture(
            embedded(bars(outcome)),
            f"{job.title}: scores with intervals",
            "Scores on held-out test rows; whiskers are 95 % bootstrap intervals. Adapters were saved, loaded from their files and merged first.",
        )
    )
    if any(measured.loss for measured in outcome.arms):
        parts.append(
            picture(
                embedded(curves(outcome)),
                f"{job.title}: learning curves",
                "Learning curves. The best step on dev was kept.",
            )
        )
    if outcome.examples:
        which = "first test rows of the draw" + (" that hold an entity" if job.needs_entity else "")
        head = (
            "given",
            "right" + (" (one of several)" if job.task == "chat" else ""),
            *(measured.arm.label for measured in outcome.arms),
        )
        rows = [
            (given, right, *(measured.answers[i] for measured in outcome.arms))
            for i, (given, right) in enumerate(outcome.examples)
        ]
        parts += [f"<p>The {len(rows)} {which}, not chosen by hand:</p>", table(head, rows)]
    return parts


def settings_table(outcomes: Sequence[Outcome]) -> str:
    head = ("task", "arm", "method", "learning rate", "steps x rows", "options")
    rows = []
    for outcome in outcomes:
        for measured in outcome.arms:
            arm = measured.arm
            options = ", ".join(f"{key} {value}" for key, value in {**arm.options, **outcome.job.task_options}.items())
            rate = f"{arm.learning_rate:g}" if arm.method else "-"
            ran = f"{measured.steps} x {outcome.job.batch}" if arm.method else "-"
            rows.append((outcome.job.name, arm.label, arm.method or "-", rate, ran, options))
    return (
        table(head, rows, numbers=(3,))
        + "<p>Learning rates were chosen on dev rows. Adapters act on all linear layers but the head; a new head is trained in full.</p>"
    )


def versions_table(how: Circumstances) -> str:
    rows = [("command", how.command), ("machine", how.machine), *how.versions.items()]
    return table(("what", "value"), rows)
