import csv
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from loratory.compare.figures import curve_plot, figures
from loratory.compare.report import write_report
from loratory.compare.statistics import differences, standings
from loratory.compare.told import opening
from tests.compare.made import NEAR, WIDE, judged_twice, made, scored

TRUE = {"lora": 0.8, "dora": 0.8, "full": 0.92, "head-only": 0.6}
LOST = {("dora", 3e-3, 1): "diverged", ("full", 3e-4, 0): "killed"}


def told(comparison):
    rows = standings(comparison)
    against = differences(comparison, comparison.baseline)
    measured = [row for row in rows if row.estimate]
    sign = 1 if comparison.greater_is_better else -1
    best = max(measured, key=lambda row: sign * row.estimate.value).method if measured else comparison.baseline
    return " ".join(opening(comparison, rows, against, differences(comparison, best)))


def test_the_first_paragraph_says_what_won_by_how_much_and_whether_it_is_real():
    text = told(made(TRUE))
    assert text.startswith("Best: full, with accuracy ")
    assert re.search(r"% \[\d+\.\d, \d+\.\d\] on 300 test rows, mean of 3 seeds\.", text)
    assert re.search(r"That is \d+\.\d points \[\d+\.\d, \d+\.\d\] more than the baseline, lora", text)
    assert re.search(r"the difference is real: p [=<] 0\.[\d]+ after Holm's correction for 3 comparisons", text)


def test_others_that_differ_from_the_baseline_are_named():
    text = told(made(TRUE | {"rslora": 0.88}))
    assert text.startswith("Best: full")
    assert "Of the others, by more than chance better than lora: rslora; worse than lora: head-only." in text
    text = told(made({"lora": 0.95, "dora": 0.7, "full": 0.6}))
    assert "the difference is real for dora and full, which are worse" in text
    assert "Of the others" not in text


def test_a_difference_that_may_be_chance_is_called_so():
    text = told(made({"lora": 0.8, "dora": 0.801}))
    assert "real: p" not in text.replace("not shown to be real: p", "")
    assert "may be chance" in text


def test_the_first_paragraph_says_one_thing_of_a_pair():
    text = told(judged_twice())
    assert "the baseline, lora (-1" in text
    assert "the difference is not shown to be real: p = 0.085 after Holm's correction for 3 comparisons" in text
    assert "All others" not in text
    assert "Not shown to differ from full: lora. Worse by more than chance: a and b." in text


def test_all_others_are_worse_only_where_all_are_shown_to_be():
    both = {0: WIDE - 5, 1: NEAR - 5}
    assert "All others are worse than full by more than chance." in told(
        scored({"lora": both, "a": {0: NEAR - 2, 1: -NEAR - 2}, "full": {0: 0 * NEAR, 1: NEAR}})
    )
    text = told(scored({"lora": both, "a": {0: NEAR - 2}, "full": {1: NEAR}}))  # a and full have no seed in common
    assert "All others" not in text
    assert "Worse by more than chance: lora." in text


def test_on_the_seeds_that_both_have_the_next_may_be_ahead():
    text = told(scored({"lora": {0: WIDE - 5, 1: WIDE - 5}, "full": {1: 0 * NEAR}, "a": {0: NEAR - 9, 1: NEAR + 0.5}}))
    assert text.startswith("Best: full")
    assert re.search(r"The next, a, is 0\.50 \[0\.\d+, 0\.\d+\] ahead of it\.", text)
    assert "Better by more than chance on the seeds that both have: a." in text
    assert "All others are worse" not in text


def test_one_seed_and_no_rows_claim_nothing():
    text = told(made(TRUE, seeds=(0,), rows=False))
    assert "cannot say whether that is chance" in text
    assert "is real" not in text
    assert "one seed, so chance in training is in no interval" in text


def test_nothing_measured_is_said():
    lost = {(m, r, s): "failed" for m in TRUE for r in (3e-4, 1e-3, 3e-3) for s in (0, 1, 2)}
    assert told(made(TRUE, lost=lost)) == "No method has a score yet, so nothing can be said about which is best."


def test_losses_are_better_when_lower():
    comparison = made(
        {"lora": 0.5, "full": 0.3}, greater_is_better=False, metric_label="loss (nats a token)", metric_scale=1.0
    )
    text = told(comparison)
    assert text.startswith("Best: full, with loss ")
    assert "nats a token" in text
    assert " less than the baseline" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    comparison = made(TRUE | {"frozen": 0.1}, lost=LOST, best={"full": 3e-3}, warnings=["a <warning> to read"])
    assert write_report(comparison, place) == place / "index.html"
    return place


def test_the_page_needs_nothing_from_outside(folder):
    text = (folder / "index.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)[^"'>]*(//|\.js|\.css)""", text)
    assert "<link" not in text
    assert "@import" not in text
    assert text.count("data:image/svg+xml;base64,") == 6
    assert "a &lt;warning&gt; to read" in text


def test_the_page_names_lost_runs_settings_versions_and_command(folder):
    text = (folder / "index.html").read_text()
    for word in (
        "diverged",
        "killed",
        "loss is nan at step 12 of dora",
        "rank 9",
        "2.13.0",
        "loratory compare --preset intents",
    ):
        assert word in text, word
    assert 'class="sortable"' in text
    assert str(folder) not in text


def test_a_curve_of_one_point_is_not_drawn():
    comparison = made(TRUE)
    short = [replace(run, dev_curve=run.dev_curve[-1:]) for run in comparison.runs]
    assert len(curve_plot(comparison).axes) == 2
    assert len(curve_plot(replace(comparison, runs=short)).axes) == 1
    assert curve_plot(replace(comparison, runs=[replace(run, loss_curve=run.loss_curve[-1:]) for run in short])) is None


def test_files_hold_the_same_numbers(folder):
    names = ("scores", "differences", "pareto", "rows", "curves", "rates")
    assert sorted(p.name for p in (folder / "plots").iterdir()) == sorted(
        f"{n}.{k}" for n in names for k in ("png", "svg")
    )
    methods = {row["method"]: row for row in csv.DictReader((folder / "methods.csv").open())}
    assert float(methods["full"]["low"]) < float(methods["full"]["mean"]) < float(methods["full"]["high"])
    assert methods["lora"]["verdict"] == "baseline"
    assert float(methods["full"]["difference"]) == pytest.approx(
        float(methods["full"]["mean"]) - float(methods["lora"]["mean"])
    )
    examples = list(csv.DictReader((folder / "examples.csv").open()))
    assert len(examples) == 300
    mean = sum(float(row["full"]) for row in examples) / 300
    assert mean == pytest.approx(float(methods["full"]["mean"]))
    runs = list(csv.DictReader((folder / "runs.csv").open()))
    assert sum(row["status"] == "done" for row in runs) == len(runs) - 2
    markdown = (folder / "report.md").read_text()
    assert "| full | " in markdown
    assert "![pareto](plots/pareto.svg)" in markdown


def test_the_same_results_give_the_same_bytes(folder, tmp_path):
    comparison = made(TRUE | {"frozen": 0.1}, lost=LOST, best={"full": 3e-3}, warnings=["a <warning> to read"])
    write_report(comparison, tmp_path)
    assert (tmp_path / "index.html").read_bytes() == (folder / "index.html").read_bytes()


def test_each_pair_has_one_line_with_the_p_that_its_verdict_is_from(tmp_path):
    write_report(judged_twice(), tmp_path)
    lines = list(csv.DictReader((tmp_path / "differences.csv").open()))
    assert [(line["method"], line["minus"], line["p_holm_over"], line["verdict"]) for line in lines] == [
        ("a", "lora", "3", "not shown"),
        ("b", "lora", "3", "not shown"),
        ("full", "lora", "3", "not shown"),
        ("a", "full", "6", "worse"),
        ("b", "full", "6", "worse"),
    ]
    assert all((float(line["p_holm"]) < 0.05) == (line["verdict"] == "worse") for line in lines)
    methods = {row["method"]: row for row in csv.DictReader((tmp_path / "methods.csv").open())}
    assert (methods["full"]["p_holm"], methods["full"]["p_holm_over"]) == (lines[2]["p_holm"], "3")
    text = (tmp_path / "report.md").read_text()
    assert "| p (Holm, 3 comparisons) |" in text
    assert "says of full and methods other than lora is corrected over all pairs" in text


def drawn(comparison):
    found = figures(comparison, standings(comparison), differences(comparison, comparison.baseline))
    return {name: figure for name, (figure, _) in found.items()}


def test_every_plot_says_axes_units_n_and_intervals():
    for name, figure in drawn(made(TRUE)).items():
        titles = [axis.get_title() for axis in figure.axes] + [figure.get_suptitle()]
        assert any("n = " in text for text in titles), name
        assert any("interval" in text or "lowest to highest" in text for text in titles), name
        labels = [axis.get_xlabel() for axis in figure.axes if axis.get_xlabel()] + [figure.get_supxlabel()]
        assert any(labels), name
    assert "accuracy (%)" in drawn(made(TRUE))["scores"].axes[0].get_xlabel()


def test_one_seed_says_that_training_is_in_no_interval():
    assert "chance in training is not in them" in drawn(made(TRUE, seeds=(0,)))["scores"].axes[0].get_title()
    assert "no interval" in drawn(made(TRUE, seeds=(0,), rows=False))["scores"].axes[0].get_title()


def test_the_edge_of_the_grid_is_marked():
    panels = {axis.get_title(): axis for axis in drawn(made(TRUE, best={"full": 3e-3}))["rates"].axes}
    assert "full (edge of grid)" in panels
    assert "lora" in panels


def test_hollow_means_not_shown():
    axis = drawn(made(TRUE))["differences"].axes[0]
    faces = [line.get_markerfacecolor() for line in axis.lines if line.get_marker() not in ("None", "|", "_", "")]
    assert faces.count("white") == 1  # dora


def test_methods_that_train_nothing_and_missing_figures_are_drawn():
    comparison = made({"frozen": 0.1, "a very long label of a method with rank=16 and alpha=32": 0.7})
    pareto = drawn(comparison)["pareto"]
    assert any("none of it" in text.get_text() for axis in pareto.axes for text in axis.texts)


def test_without_matplotlib_the_tables_are_written_and_the_page_says_so(tmp_path):
    code = f"""
import sys; sys.modules["matplotlib"] = None
from pathlib import Path
from loratory.compare.report import write_report
from tests.compare.made import made
print(write_report(made({{"lora": 0.8, "dora": 0.9}}), Path({str(tmp_path / "out")!r})).read_text())
"""
    page = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "The plots are left out" in page
    assert "pip install" in page
    assert not (tmp_path / "out" / "plots").exists()
