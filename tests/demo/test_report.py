import base64
import json
import re

import pytest
from matplotlib.container import ErrorbarContainer

from loratory.demo.figures import bars, costs, curves
from loratory.demo.outcome import Measured, Outcome, sentence, verdict
from loratory.demo.plan import DRAWS, JOBS
from loratory.demo.report import Circumstances, write_report

HOW = Circumstances(command="loratory demo --out x", seconds=390.0, versions={"torch": "2.13.0"}, machine="2 CPU cores")


def measured(job, place, value, half, answer="fine"):
    arm = job.arms[place]
    metrics = {}
    for score in job.scores:
        metrics |= {score: value, f"{score}_low": value - half, f"{score}_high": value + half}
    if arm.method is None:
        return Measured(arm=arm, metrics=metrics, answers=[answer], total=1000)
    curve = {"loss": [(10, 2.0), (20, 1.0)], "dev": [(0, 0.1), (20, 0.5)]}
    more = {
        "trained": 12345 + place,
        "total": 1_000_000,
        "steps": 20,
        "seconds": 12.3,
        "peak_memory": (700 + place) * 2**20,
    }
    return Measured(arm=arm, metrics=metrics, answers=[answer], merge_error=1e-7, **more, **curve)


def made(name, values, half, **text):
    job = next(job for job in JOBS if job.name == name)
    outcome = Outcome(
        job, rows={"test": 321, "test_all": 3080, "dev": 200, "train": 8972}, examples=[("question", "answer")]
    )
    outcome.arms = [measured(job, place, value, half, **text) for place, value in enumerate(values)]
    return outcome


@pytest.fixture
def outcomes():
    return [
        made("facts", (20.0, 50.0, 51.0), 4.0),
        made("intents", (0.5, 0.7, 0.71), 0.03),
        made("diseases", (0.4, 0.6, 0.42), 0.05),
    ]


def test_the_bars_have_axes_units_n_values_and_whiskers(outcomes):
    for outcome in outcomes:
        axes = bars(outcome).axes
        assert [axis.get_ylabel() for axis in axes] == list(outcome.job.scores.values())
        for axis in axes:
            assert "n = 321 held-out test rows" in axis.get_title()
            assert f"95 % bootstrap interval ({DRAWS:,} draws)" in axis.get_title()
            assert [label.get_text() for label in axis.get_xticklabels()] == [arm.label for arm in outcome.job.arms]
            whiskers = [
                each.lines[2][0].get_segments()[0] for each in axis.containers if isinstance(each, ErrorbarContainer)
            ]
            score = next(key for key, label in outcome.job.scores.items() if label == axis.get_ylabel())
            for each, segment in zip(outcome.arms, whiskers, strict=True):
                assert segment[:, 1].tolist() == pytest.approx(
                    [each.metrics[f"{score}_low"], each.metrics[f"{score}_high"]]
                )


def test_the_learning_curves_have_axes_units_and_n(outcomes):
    left, right = curves(outcomes[0]).axes
    assert (left.get_xlabel(), left.get_ylabel()) == ("step (4 rows each)", "training loss (nats)")
    assert right.get_ylabel() == "loss on dev (nats a token)"
    assert (left.get_title(), right.get_title()) == ("n = 80 training rows seen by each", "n = 200 dev rows")
    assert [line.get_label() for line in left.get_lines()] == ["LoRA", "DoRA"]
    assert right.get_lines()[0].get_xydata().tolist() == [[0, 0.1], [20, 0.5]]


def test_the_costs_show_every_training_run(outcomes):
    left, right = costs(outcomes).axes
    assert "count" in left.get_xlabel()
    assert "MiB" in right.get_xlabel()
    assert left.get_title() == "n = 8 training runs, one each"
    assert [text.get_text() for text in left.texts][:2] == ["12,346", "12,347"]
    assert [text.get_text() for text in right.texts][:2] == ["701", "702"]


def test_the_page_needs_no_network_and_holds_every_number(tmp_path, outcomes):
    text = write_report(tmp_path, outcomes, HOW).read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "<script" not in text
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(pictures) == 2 * 3 + 1
    assert all(b"<svg" in base64.b64decode(each) for each in pictures)
    for part in (
        "0.700 [0.670, 0.730]",
        "50.0 [46.0, 54.0]",
        "12,346",
        "701",
        "321 of 3,080 test rows",
        "2.13.0",
        "loratory demo --out x",
        "6.5 minutes",
    ):
        assert part in text, part
    assert "not a result" not in text


def test_the_results_file_says_what_the_page_says(tmp_path, outcomes):
    write_report(tmp_path, outcomes, HOW)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["is_a_result"]
    assert [job["name"] for job in results["jobs"]] == ["facts", "intents", "diseases"]
    arm = results["jobs"][0]["arms"][1]
    assert (arm["label"], arm["metrics"]["bleu"], arm["metrics"]["bleu_low"], arm["trained"]) == (
        "LoRA",
        50.0,
        46.0,
        12346,
    )
    assert results["jobs"][0]["rows"]["test"] == 321


def test_a_smoke_run_and_a_stopped_run_say_so_on_the_page(tmp_path, outcomes):
    how = Circumstances(command="c", seconds=1, versions={}, machine="m", quick=True, stopped="stopped by Ctrl-C")
    text = write_report(tmp_path, [outcomes[0], Outcome(JOBS[1])], how).read_text()
    assert "Its numbers are not a result" in text
    assert "Not finished: stopped by Ctrl-C" in text
    assert JOBS[1].title not in text
    assert not json.loads((tmp_path / "results.json").read_text())["is_a_result"]


def test_answers_of_a_model_cannot_become_html(tmp_path):
    outcome = made("facts", (20.0, 50.0, 51.0), 4.0, answer="<script>alert('&')</script>")
    outcome.examples = [("<b>facts</b>", 'a "right" one')]
    text = write_report(tmp_path, [outcome], HOW).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in text
    assert "&lt;b&gt;facts&lt;/b&gt;" in text


def test_a_report_of_the_base_alone_has_no_curves(tmp_path):
    outcome = made("facts", (20.0,), 4.0)
    text = write_report(tmp_path, [outcome], HOW).read_text()
    assert text.count("data:image/svg+xml") == 1
    assert "nothing can be said about gains" in text


def test_the_sentence_names_gain_and_overlap(outcomes):
    facts, diseases = sentence(outcomes[0]), sentence(outcomes[2])
    assert "before 20.0 [16.0, 24.0]; LoRA 50.0 [46.0, 54.0]" in facts
    assert "LoRA gained 30.0, and its interval does not overlap that of before." in facts
    assert "The intervals of LoRA and DoRA overlap" in facts
    assert "DoRA gained 0.020, and its interval overlaps that of head only." in diseases
    assert "The intervals of LoRA and DoRA do not overlap." in diseases
    assert "lost 0.100" in sentence(made("intents", (0.8, 0.7), 0.01))


def test_the_verdict_counts_only_intervals_that_are_apart(outcomes):
    assert verdict(outcomes[:2]).startswith(
        "LoRA and DoRA gained on the untouched model or a head trained alone in every task"
    )
    mixed = verdict(outcomes)
    assert mixed.startswith("In 5 of 6 comparisons")
    assert mixed.endswith(f"not so: DoRA in '{outcomes[2].job.title}'.")
    assert "In 0 of 1 comparisons" in verdict([made("intents", (0.8, 0.7), 0.01)])  # apart, but worse
