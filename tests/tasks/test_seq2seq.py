import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from loratory.tasks import make_task

ROWS = [{"input": "my card was charged", "target": "the fee"}, {"input": "my card", "target": "lost is my card"}]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=15, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=3,
        decoder_start_token_id=2,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def test_loss_only_on_the_target(pieces_tokenizer):
    task = make_task("seq2seq", input_prefix="the ").resolve(ROWS)
    encoded = task.encode(ROWS, pieces_tokenizer)
    assert encoded[0] == {"input_ids": [2, 4, 11, 5, 7, 8, 9, 3], "attention_mask": [1] * 8, "labels": [2, 4, 6, 3]}
    assert (encoded.supervised, encoded.truncated) == (10, 0)
    assert "-> [[[CLS] the fee [SEP]]]" in str(task.preview(encoded, pieces_tokenizer))
    assert task.notes() == ("seq2seq: input from 'input', target from 'target'; loss on the target",)


def test_cut_inputs_and_targets_are_counted(pieces_tokenizer):
    encoded = make_task("seq2seq", max_length=5, max_target_length=4).resolve(ROWS).encode(ROWS, pieces_tokenizer)
    assert encoded.truncated == 2
    assert [len(example["input_ids"]) for example in encoded.examples] == [5, 4]
    assert [len(example["labels"]) for example in encoded.examples] == [4, 4]


def test_evaluate_equals_the_model_s_own_loss(model, pieces_tokenizer):
    task = make_task("seq2seq", max_target_length=6).resolve(ROWS)
    batch = task.collator(pieces_tokenizer)(task.encode(ROWS, pieces_tokenizer).examples)
    with torch.no_grad():
        loss = model(**batch).loss.item()
    found = task.evaluate(model, pieces_tokenizer, ROWS)
    assert found["token_loss"] == pytest.approx(loss, rel=1e-5)
    assert found["tokens"] == 10
    assert {"bleu", "chrf"} <= set(found)


def test_batched_answers_equal_answers_one_by_one(model, pieces_tokenizer):
    task = make_task("seq2seq", max_target_length=5).resolve(ROWS)
    together = task.predict(model, pieces_tokenizer, ROWS, batch_size=2)
    assert together == [task.predict(model, pieces_tokenizer, [row])[0] for row in ROWS]


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        (
            [{"a": "x", "b": "y"}],
            ValueError,
            "task 'seq2seq' finds no columns it knows .*input, target; source, target",
        ),
        ([{"input": "x", "target": None}], TypeError, "row 1: column 'target' holds None"),
        ([ROWS[0], {"input": "x"}], ValueError, "row 2: column 'target' is missing"),
        ([], ValueError, "no rows"),
    ],
)
def test_bad_rows(rows, kind, message):
    with pytest.raises(kind, match=message):
        make_task("seq2seq").resolve(rows)
