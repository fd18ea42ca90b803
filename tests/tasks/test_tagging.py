from types import SimpleNamespace

import numpy as np
import pytest
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2
from transformers import BertForTokenClassification

from loratory.tasks import make_task
from loratory.tasks.rows import Row
from loratory.tasks.tagging import entity_scores

ROWS = [
    {"tokens": ["my", "card", "charged", "."], "tags": ["O", "B-Thing", "B-Event", "O"]},
    {"tokens": ["the", "card", "fee"], "tags": ["O", "B-Thing", "I-Thing"]},
]


@pytest.fixture
def task():
    return make_task("tagging").resolve(ROWS)


def test_first_pieces_carry_the_tags(task, pieces_tokenizer):
    encoded = task.encode(ROWS, pieces_tokenizer)
    assert task.labels == ("O", "B-Event", "I-Event", "B-Thing", "I-Thing")
    assert encoded[0]["input_ids"] == [2, 11, 5, 8, 9, 14, 3]
    assert encoded[0]["labels"] == [-100, 0, 3, 1, -100, 0, -100]
    assert encoded[1]["labels"] == [-100, 0, 3, 4, -100]
    assert encoded.supervised == 7
    assert "[[ch/B-Event]] ##arged [[./O]] [SEP]" in str(task.preview(encoded, pieces_tokenizer))


def test_cut_words_are_counted_and_tagged_outside(pieces_tokenizer, tiny_bert):
    task = make_task("tagging", max_length=4).resolve(ROWS)
    encoded = task.encode(ROWS, pieces_tokenizer)
    assert (encoded.truncated, encoded.supervised) == (2, 4)
    model = tiny_bert(BertForTokenClassification, num_labels=5)
    found = task.predict(model, pieces_tokenizer, ROWS)
    assert [len(tags) for tags in found] == [4, 3]
    assert found[0][2:] == ["O", "O"]
    assert found[1][2:] == ["O"]


@pytest.mark.parametrize(
    ("tokens", "tags", "kind", "message"),
    [
        (["a", "b"], ["O", "I-X"], ValueError, r"d\.conll row 3, word 2 'b': tag 'I-X' follows 'O', .*B- .IOB2."),
        (["a", "b"], ["B-Y", "I-X"], ValueError, "tag 'I-X' follows 'B-Y'"),
        (["a"], ["X"], ValueError, "tag 'X' is none of O, B-<type> and I-<type>"),
        (["a"], [3], ValueError, "tag 3 is none of"),
        (["a", "b"], ["O"], ValueError, "2 words but 1 tags in column 'tags'"),
        ([], [], TypeError, "must be a list of words"),
        ("a b", ["O"], TypeError, "column 'tokens' holds 'a b' .str., but a list is expected"),
        (["a"], ["O"], ValueError, "tags no word of 1 rows as an entity"),
    ],
)
def test_bad_rows(tokens, tags, kind, message):
    with pytest.raises(kind, match=message):
        make_task("tagging").resolve([Row({"tokens": tokens, "tags": tags}, "d.conll row 3")])


def test_missing_columns_and_unseen_types(task, pieces_tokenizer):
    with pytest.raises(ValueError, match=r"finds no columns it knows .columns found: words;"):
        make_task("tagging").resolve([{"words": ["a"]}])
    bad = [*ROWS, Row({"tokens": ["my"], "tags": ["B-Person"]}, "dev.conll row 9 (line 80)")]
    with pytest.raises(ValueError, match=r"dev\.conll row 9 .line 80.: 'B-Person' was not seen in training"):
        task.encode(bad, pieces_tokenizer)


def test_entity_scores_equal_seqeval():
    right = [["B-X", "I-X", "O", "B-Y"], ["O", "B-X", "B-X", "I-X"], ["O", "O"]]
    guess = [["B-X", "I-X", "O", "B-X"], ["O", "I-X", "B-X", "I-X"], ["B-Y", "O"]]
    found = entity_scores(guess, right, draws=50)
    for key, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert found[key] == pytest.approx(score(right, guess, mode="strict", scheme=IOB2))
        assert found[f"{key}_low"] <= found[key] <= found[f"{key}_high"]
    assert found["precision"] == 2 / 4
    assert found["recall"] == 2 / 4


def test_trainer_metrics_skip_masked_positions(task):
    labels = np.array([[-100, 0, 3, 1, -100], [-100, 3, 4, -100, -100]])
    guess = np.where(labels == -100, 4, labels)
    assert task.metrics()(SimpleNamespace(predictions=guess, label_ids=labels))["f1"] == 1.0
    guess[0, 2] = 0
    assert task.metrics()(SimpleNamespace(predictions=guess, label_ids=labels))["recall"] == pytest.approx(2 / 3)


def test_predictions_do_not_depend_on_the_batch(task, pieces_tokenizer, tiny_bert):
    model = tiny_bert(BertForTokenClassification, num_labels=5)
    together = task.predict(model, pieces_tokenizer, ROWS, batch_size=2)
    assert together == [task.predict(model, pieces_tokenizer, [row])[0] for row in ROWS]
    assert set(task.evaluate(model, pieces_tokenizer, ROWS)) == {"precision", "recall", "f1"}
