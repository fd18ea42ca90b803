import json
from pathlib import Path

import pytest

from loratory.demo.measure import curves, entities, fresh_peak, given, measure_job, right, run_settings, words
from loratory.demo.outcome import Outcome
from loratory.demo.plan import JOBS, Arm, quick
from loratory.methods.registry import METHODS
from loratory.train import Result

ROOT = Path(__file__).parents[2]


def test_a_job_trains_saves_reloads_merges_and_measures(tmp_path):
    rows = [{"mr": f"name[Bar {i}], area[riverside]", "ref": f"Bar {i} is by the river."} for i in range(8)]
    (tmp_path / "e2e").mkdir()
    for split in ("train", "dev", "test"):
        each = (
            rows if split == "train" else [{"mr": row["mr"], "refs": [row["ref"], "By the river."]} for row in rows[:4]]
        )
        (tmp_path / "e2e" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    job = quick(next(job for job in JOBS if job.name == "facts"))
    job = type(job)(**{**vars(job), "base": str(ROOT / "tests/models/stories260k"), "test_rows": 3})
    outcome, said = Outcome(job), []
    measure_job(outcome, tmp_path, tmp_path / "runs", said.append)
    before, lora, dora = outcome.arms
    assert [each.arm.label for each in outcome.arms] == ["before", "LoRA", "DoRA"]
    assert outcome.rows == {"test": 3, "test_all": 4, "train": 8, "dev": 4}
    assert (before.trained, before.peak_memory, before.loss) == (0, None, [])
    assert 0 < lora.trained < dora.trained
    assert [step for step, _ in lora.loss] == [1, 2]
    assert [step for step, _ in lora.dev] == [0, 2]
    assert lora.merge_error is not None
    assert lora.merge_error < 1e-5
    for each in outcome.arms:
        assert each.metrics["bleu_low"] <= each.metrics["bleu_high"]
        assert len(each.answers) == len(outcome.examples) == 3
    assert (tmp_path / "runs/facts-lora/adapter/adapter.safetensors").is_file()
    text = "\n".join(said)
    assert text.count("the first training example:") == 1  # said for one arm, not for each
    assert text.count("measured 3 of 3 test rows") == 3


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_run_has_settings_that_train_accepts(job, tmp_path):
    for each in (job, quick(job)):
        for arm in each.arms:
            if arm.method is not None:
                assert arm.method in METHODS
                settings = run_settings(each, arm, ROOT / "data", tmp_path)
                assert (settings.max_steps, settings.learning_rate, settings.test) == (
                    each.steps,
                    arm.learning_rate,
                    None,
                )
                assert settings.method_options == arm.options
                assert Path(settings.train).is_file()


def test_the_best_of_the_curves_is_kept():
    history = [
        {"step": 5, "loss": 2.0},
        {"step": 5, "eval_f1": 0.3},
        {"step": 10, "loss": 1.0},
        {"step": 10, "eval_f1": 0.5},
        {"step": 10, "eval_f1": 0.6},
    ]
    result = Result(output_dir="x", adapter="x", before={"f1": 0.1}, history=history)
    assert curves(result, "f1") == {"loss": [(5, 2.0), (10, 1.0)], "dev": [(0, 0.1), (5, 0.3), (10, 0.6)]}


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B I O B", "a b | d"),
        ("B B I O", "a | b c"),
        ("I I O I", "(none)"),  # an entity begins with B
        ("O B O I", "b"),
    ],
)
def test_tags_are_shown_as_entities(tags, found):
    assert entities(list("abcd"), [tag if tag == "O" else f"{tag}-Disease" for tag in tags.split()]) == found


def test_rows_and_answers_are_shown_as_text():
    facts, intents, diseases = JOBS
    assert given(intents, {"text": "t", "label": "card_lost"}) == "t"
    assert right(intents, {"text": "t", "label": "card_lost"}) == "card lost"
    assert given(diseases, {"tokens": ["a", "b"], "tags": ["O", "B-X"]}) == "a b"
    assert right(diseases, {"tokens": ["a", "b"], "tags": ["O", "B-X"]}) == "b"
    assert right(facts, {"mr": "m", "refs": ["r", "s"]}) == "r"
    assert words(facts, {"mr": "m"}, "said") == "said"


def test_memory_of_an_earlier_run_does_not_count():
    import resource

    block = bytearray(200 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    del block
    if fresh_peak():
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before - 150 * 2**10


def test_an_arm_without_a_method_is_the_base():
    assert Arm(label="before").method is None
