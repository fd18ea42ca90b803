from types import SimpleNamespace

import numpy as np
import pytest
from transformers import BertForSequenceClassification

from loratory.tasks import make_task
from loratory.tasks.rows import Row

ROWS = [
    {"text": "my card was charged", "label": "fee"},
    {"text": "my card is lost", "label": "lost"},
    {"text": "the fee", "label": "fee"},
]


@pytest.fixture
def task():
    return make_task("classification").resolve(ROWS)


def test_labels_and_encoding(task, pieces_tokenizer):
    encoded = task.encode(ROWS, pieces_tokenizer)
    assert task.labels == ("fee", "lost")
    assert task.model_kwargs()["id2label"] == {0: "fee", 1: "lost"}
    assert [example["labels"] for example in encoded.examples] == [0, 1, 0]
    assert encoded[0]["input_ids"] == [2, 11, 5, 7, 8, 9, 3]
    assert (encoded.rows, encoded.truncated, encoded.supervised, encoded.tokens) == (3, 0, 3, 17)
    assert str(task.preview(encoded, pieces_tokenizer)).startswith("[CLS] my card was charged [SEP] -> [[fee]]")


def test_pairs_and_numbered_labels(pieces_tokenizer):
    rows = [{"text1": "my card", "text2": "the fee", "label": number} for number in (10, 2)]
    task = make_task("classification").resolve(rows)
    assert task.labels == ("2", "10")
    assert task.notes() == ("classification: text from 'text1' and 'text2', label from 'label' (2 labels)",)
    assert task.encode(rows, pieces_tokenizer)[0] == {
        "input_ids": [2, 11, 5, 3, 4, 6, 3], "token_type_ids": [0, 0, 0, 0, 1, 1, 1],
        "attention_mask": [1] * 7, "labels": 1,
    }  # fmt: skip


def test_truncation_keeps_the_special_tokens(pieces_tokenizer):
    encoded = make_task("classification", max_length=4).resolve(ROWS).encode(ROWS, pieces_tokenizer)
    assert encoded.truncated == 2
    assert encoded[0]["input_ids"] == [2, 11, 5, 3]
    with pytest.raises(ValueError, match="max_length is 65, but this model reads at most 64"):
        make_task("classification", max_length=65).resolve(ROWS).encode(ROWS, pieces_tokenizer)


def test_unseen_labels_are_named(task, pieces_tokenizer, tiny_bert):
    bad = [ROWS[0], Row({"text": "my card", "label": "theft"}, "dev.jsonl row 7"), {"text": "the", "label": "joy"}]
    message = r"row 3: 'joy', 'theft' were not seen in training, which has 2 labels \(fee, lost\)"
    with pytest.raises(ValueError, match=message):
        task.encode(bad, pieces_tokenizer)
    with pytest.raises(ValueError, match=r"dev\.jsonl row 7: 'theft' was not seen"):
        task.encode(bad[:2], pieces_tokenizer)
    model = tiny_bert(BertForSequenceClassification, num_labels=2)
    with pytest.raises(ValueError, match="were not seen"):
        task.evaluate(model, pieces_tokenizer, bad)


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([{"text": "a", "label": "x"}], ValueError, "column 'label' holds only the label 'x'"),
        ([{"body": "a", "label": "x"}], ValueError, r"no columns it knows \(columns found: body, label;"),
        ([{"text": "a", "label": 1.5}], TypeError, "'label' holds 1.5 .float., but text or a whole number"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], TypeError, "row 2: column 'label' holds None"),
        ([{"text": "a", "label": "x"}, {"text": "b"}], ValueError, "row 2: column 'label' is missing"),
        ([], ValueError, "no rows"),
    ],
)
def test_bad_rows(rows, kind, message):
    with pytest.raises(kind, match=message):
        make_task("classification").resolve(rows)


def test_scores_against_hand_made_numbers(task):
    rows = [{"text": "a", "label": label} for label in ("fee", "fee", "fee", "lost")]
    found = task.score(["fee", "fee", "lost", "lost"], rows, draws=200)
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found["accuracy_low"] < 0.75 < found["accuracy_high"]
    trainer = SimpleNamespace(predictions=np.array([0, 0, 1, 1]), label_ids=np.array([0, 0, 0, 1]))
    assert task.metrics()(trainer) == {key: found[key] for key in ("accuracy", "macro_f1")}


def test_predictions_do_not_depend_on_the_batch(task, pieces_tokenizer, tiny_bert):
    model = tiny_bert(BertForSequenceClassification, num_labels=2)
    assert task.head_modules(model) == ("classifier",)
    together = task.predict(model, pieces_tokenizer, ROWS, batch_size=3)
    assert together == [task.predict(model, pieces_tokenizer, [row])[0] for row in ROWS]
    assert set(together) <= {"fee", "lost"}
    assert set(task.evaluate(model, pieces_tokenizer, ROWS)) == {"accuracy", "macro_f1"}
