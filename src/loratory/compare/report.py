"""The report of a comparison, rebuilt from its results at any time."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev

from loratory.compare.outcome import Comparison
from loratory.train.folder import write_text


def write_report(comparison: Comparison, folder: Path) -> Path:
    """Write the report's files into the folder, and return the one to read first."""
    label, scale = comparison.metric_label, comparison.metric_scale
    lines = [f"# {comparison.name}", "", f"| method | learning rate | trained | {label} on test | seeds |", "|---|---|---|---|---|"]
    for method in comparison.methods:
        runs = [run for run in comparison.runs if run.method == method and run.test is not None]
        if not runs:
            lines.append(f"| {method} | - | - | no result | 0 |")
            continue
        scores = [scale * run.test[comparison.metric] for run in runs if run.test is not None]
        spread = f" (standard deviation {stdev(scores):.2f})" if len(scores) > 1 else ""
        rate = f"{runs[0].learning_rate:g}" if runs[0].learning_rate else "-"
        lines.append(f"| {method} | {rate} | {runs[0].trained:,} | {fmean(scores):.3f}{spread} | {len(runs)} |")
    lines += ["", *(f"- {warning}" for warning in comparison.warnings)]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.md", "\n".join(lines).rstrip() + "\n")
    return folder / "report.md"
