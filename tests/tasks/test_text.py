import pytest
import torch

from loratory.tasks import make_task

ROWS = [{"text": "Once upon a time"}, {"text": "Tom sat"}]


def test_documents_are_packed_with_end_tokens(stories_tokenizer):
    task = make_task("text", max_length=4).resolve(ROWS)
    encoded = task.encode(ROWS, stories_tokenizer)
    stream = [token for example in encoded.examples for token in example["input_ids"]]
    first, second = (stories_tokenizer(row["text"])["input_ids"] + [2] for row in ROWS)
    assert stream == (first + second)[: len(stream)]
    assert all(len(example["input_ids"]) == 4 for example in encoded.examples[:-1])
    assert all(example["labels"] == example["input_ids"] for example in encoded.examples)
    assert encoded.supervised == encoded.tokens - len(encoded)
    assert encoded.origins[0] == "row 1"
    assert encoded.origins[-1] == "row 2"


def test_evaluate_equals_the_model_s_own_loss(stories, stories_tokenizer):
    row = [{"text": "Once upon a time, there was a little girl named Lily."}]
    task = make_task("text").resolve(row)
    ids = torch.tensor([stories_tokenizer(row[0]["text"])["input_ids"] + [2]])
    with torch.no_grad():
        loss = stories.eval()(ids, labels=ids).loss.item()
    assert task.evaluate(stories, stories_tokenizer, row)["token_loss"] == pytest.approx(loss, rel=1e-5)
    assert task.score([""], row) == {}


def test_the_text_goes_on(stories, stories_tokenizer):
    task = make_task("text", max_new_tokens=8).resolve(ROWS)
    assert task.predict(stories, stories_tokenizer, ROWS)[0].startswith(", there was a")


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([{"body": "a"}], ValueError, "task 'text' finds no columns it knows"),
        ([{"text": "a"}, {"text": 4}], TypeError, "row 2: column 'text' holds 4"),
        ([], ValueError, "no rows"),
    ],
)
def test_bad_rows(rows, kind, message):
    with pytest.raises(kind, match=message):
        make_task("text").resolve(rows)
