import copy

import pytest
import torch
from transformers import BertForTokenClassification, Trainer, TrainingArguments

from loratory.tasks import TASKS, PadBatch, make_task
from loratory.tasks.task import pad_id


def test_right_and_left_padding():
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]},
            {"input_ids": [8], "attention_mask": [1], "labels": [8]}]  # fmt: skip
    right, left = PadBatch(0)(rows), PadBatch(9, side="left")(rows)
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert right["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert left["input_ids"].tolist() == [[5, 6, 7], [9, 9, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_single_labels_become_one_tensor():
    batch = PadBatch(0)([{"input_ids": [1], "labels": 3}, {"input_ids": [1, 2], "labels": 0}])
    assert torch.equal(batch["labels"], torch.tensor([3, 0]))


def test_every_task_comes_back_from_its_settings():
    for name, kind in TASKS.items():
        task = make_task(name, **({} if name == "image" else {"max_length": 8}))
        assert type(task) is kind
        assert task.name == name
        assert make_task(**task.settings()) == task


def test_trainer_takes_a_task_s_parts(tmp_path, stories, stories_tokenizer, pieces_tokenizer, tiny_bert):
    """Trainer's own evaluation gives the task's numbers, over uneven batches."""
    chat = [{"prompt": "a dog", "completion": "It ran away"}, {"prompt": "Tom", "completion": "sat"},
            {"prompt": "the", "completion": "end"}]  # fmt: skip
    tags = [{"tokens": ["my", "card", "charged"], "tags": ["O", "B-X", "I-X"]}, {"tokens": ["the"], "tags": ["B-X"]},
            {"tokens": ["fee", "card"], "tags": ["O", "B-X"]}]  # fmt: skip
    bert = tiny_bert(BertForTokenClassification, num_labels=3)
    for name, rows, model, tokenizer in (
        ("chat", chat, copy.deepcopy(stories), stories_tokenizer), ("tagging", tags, bert, pieces_tokenizer),
    ):  # fmt: skip
        task = make_task(name, max_length=48).resolve(rows)
        encoded = task.encode(rows, tokenizer)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=2,
            report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=encoded, eval_dataset=encoded,
            data_collator=task.collator(tokenizer), compute_metrics=task.metrics(),
            preprocess_logits_for_metrics=task.reduce_logits,
        )  # fmt: skip
        assert trainer.train().global_step == 2
        seen = trainer.evaluate()
        assert f"eval_{task.best_metric[0]}" in seen
        if name == "chat":
            task = make_task("chat", max_length=48, max_new_tokens=2).resolve(rows)
        expected = task.evaluate(model, tokenizer, rows, batch_size=3)
        for key in task.metrics()(trainer.predict(encoded)):
            assert seen[f"eval_{key}"] == pytest.approx(expected[key], rel=1e-4)


def test_padding_falls_back_to_the_end_token(stories_tokenizer):
    stories_tokenizer.pad_token = None
    assert pad_id(stories_tokenizer) == stories_tokenizer.eos_token_id
