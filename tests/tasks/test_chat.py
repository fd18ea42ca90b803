import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from loratory.tasks import make_task
from loratory.tasks.chat import PLAIN_TEMPLATE
from loratory.tasks.rows import Row
from loratory.tasks.task import IGNORED

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"},
    {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long"},
]  # fmt: skip


def supervised(tokenizer, encoded, index=0):
    """The supervised runs of one example, as text."""
    runs, example = [[]], encoded[index]
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run).strip() for run in runs if run]


@pytest.fixture
def chatml(stories_tokenizer):
    stories_tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    stories_tokenizer.chat_template = CHATML
    return stories_tokenizer


def test_plain_mask_token_by_token(stories_tokenizer):
    task = make_task("chat").resolve([{"prompt": "a dog", "completion": "It ran"}])
    encoded = task.encode([{"prompt": "a dog", "completion": "It ran"}], stories_tokenizer)
    example = encoded[0]
    names = stories_tokenizer.convert_ids_to_tokens(example["input_ids"])
    shown = [name if label != IGNORED else "" for name, label in zip(names, example["labels"], strict=True)]
    assert names == [
        "<s>", "▁", "U", "s", "er", ":", "▁a", "▁do", "g", "<0x0A>", "A", "s", "s", "is", "t", "an", "t", ":",
        "▁I", "t", "▁r", "an", "</s>",
    ]  # fmt: skip
    assert shown == [""] * 18 + ["▁I", "t", "▁r", "an", "</s>"]
    assert (encoded.supervised, encoded.tokens, encoded.rows) == (5, 23, 1)
    assert "no chat template" in encoded.notes[0]


def test_every_assistant_turn_with_its_end_token(chatml):
    task = make_task("chat").resolve([{"messages": TALK}])
    encoded = task.encode([{"messages": TALK}], chatml)
    assert supervised(chatml, encoded) == ["Hello you<|im_end|>", "So long<|im_end|>"]
    assert encoded.notes == ()


def test_only_the_last_answer(chatml):
    task = make_task("chat", answers="last").resolve([{"messages": TALK}])
    assert supervised(chatml, task.encode([{"messages": TALK}], chatml)) == ["So long<|im_end|>"]


def test_template_that_rewrites_earlier_turns(chatml):
    chatml.chat_template = (
        "{% for m in messages %}<|im_start|>{% if loop.last %}NEW {% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"d\.jsonl row 4: .*turn 2 differently.*answers='last'"):
        make_task("chat", messages_column="messages").encode([Row({"messages": TALK}, "d.jsonl row 4")], chatml)


def test_template_that_refuses_a_system_turn(chatml):
    chatml.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    task = make_task("chat", system="Be brief").resolve([{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="row 1: the tokenizer's chat template refuses the conversation: no system"):
        task.encode([{"prompt": "a", "completion": "b"}], chatml)


def test_answer_without_an_end_token_is_said(chatml):
    chatml.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    rows = [{"prompt": "a", "completion": "b"}]
    assert "1 answers end without" in make_task("chat").resolve(rows).encode(rows, chatml).notes[0]


def test_system_message_and_instruction_input(chatml):
    rows = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"instruction": "Say no", "input": "", "output": "no"},
    ]
    task = make_task("chat", system="Be brief").resolve(rows)
    assert task.prompt_messages(rows[0]) == [
        {"role": "system", "content": "Be brief"}, {"role": "user", "content": "Add\n\n1 2"},
    ]  # fmt: skip
    assert task.prompt_messages(rows[1])[-1]["content"] == "Say no"
    assert "column 'input'" in task.notes()[0]


def test_sharegpt_roles_are_read():
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    task = make_task("chat").resolve([row])
    assert [m["role"] for m in task.conversation(row)] == ["user", "assistant"]
    assert task.prompt_messages(row) == [{"role": "user", "content": "Hi"}]
    assert task.references(row) == ["Yo"]


def test_template_columns_and_references():
    train = [{"mr": "name[A {b}]", "ref": "A is."}]
    dev = {"mr": "name[C]", "refs": ["C is.", "It is C."]}
    settings = {"prompt_template": "Say: {mr}", "completion_column": "ref", "references_column": "refs"}
    task = make_task("chat", **settings).resolve(train)
    assert task.prompt_messages(train[0]) == [{"role": "user", "content": "Say: name[A {b}]"}]
    assert task.references(train[0]) == ["A is."]
    assert task.references(dev) == dev["refs"]
    assert task.conversation(dev)[-1]["content"] == "C is."
    assert make_task(**task.settings()) == task


def test_truncated_and_dropped_are_counted(stories_tokenizer):
    rows = [{"prompt": "a dog", "completion": "It ran"}, {"prompt": "a dog " * 9, "completion": "x"}]
    encoded = make_task("chat", max_length=20).resolve(rows).encode(rows, stories_tokenizer)
    assert (encoded.rows, len(encoded), encoded.truncated, encoded.dropped) == (2, 1, 2, 1)
    assert encoded.supervised == 2
    assert encoded.origins == ["row 1"]
    with pytest.raises(ValueError, match=r"no token of the 2 rows is supervised .2 rows dropped"):
        make_task("chat", max_length=5).resolve(rows).encode(rows, stories_tokenizer)


def test_preview_shows_the_mask(chatml):
    row = {"question": "Hi", "answer": "Yo"}
    task = make_task("chat").resolve([row])
    shown = str(task.preview(task.encode([row], chatml), chatml))
    assert "[[Yo<|im_end|>]]" in shown
    assert "1 rows, 1 examples, 0 truncated, 0 dropped" in shown


@pytest.mark.parametrize(
    ("settings", "rows", "kind", "message"),
    [
        ({}, [{"mr": "a", "ref": "b"}], ValueError, r"row 1: task 'chat' finds no columns.*\(columns found: mr, ref;"),
        ({}, [], ValueError, "task 'chat' was given no rows"),
        ({"prompt_column": "mr", "completion_column": "ref"}, [{"mr": "a", "ref": "b"}, Row({"mr": "a", "refs": ["b"]}, "t.jsonl row 17")],
         ValueError, r"t\.jsonl row 17: column 'ref' is missing \(columns found: mr, refs\); .*completion_column="),
        ({}, [{"prompt": "a", "completion": 5}], TypeError, "row 1: column 'completion' holds 5 .int., but text"),
        ({}, [{"messages": [{"role": "robot", "content": "a"}]}], ValueError, "turn 1 is .*role .human, gpt, system"),
        ({}, [{"messages": [{"role": "assistant", "content": "a"}]}], ValueError, "must begin with a system or user"),
        ({"prompt_template": "{no}", "completion_column": "b"}, [{"a": "x", "b": "y"}], ValueError, "'no' is missing"),
        ({"references_column": "refs"}, [{"prompt": "a", "completion": "b", "refs": [1]}, {"prompt": "a"}],
         ValueError, "row 2: column 'completion' is missing"),
    ],
)  # fmt: skip
def test_bad_rows(settings, rows, kind, message):
    with pytest.raises(kind, match=message):
        make_task("chat", **settings).resolve(rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answers": "first"}, "answers is 'first'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_length": 1}, "max_length is 1"),
        ({"prompt_template": "no braces"}, "names no column"),
        ({"prompt_template": "{open"}, "cannot be read"),
        ({"messages_column": "m", "prompt_column": "p"}, "cannot be named too"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_task("chat", **settings)


def test_unknown_task_and_setting():
    with pytest.raises(ValueError, match=r"task 'taging' is unknown; nearest: tagging"):
        make_task("taging")
    with pytest.raises(ValueError, match="task 'text' has no setting 'columns'; it has: max_length, text_column"):
        make_task("text", columns="a")


def test_batched_answers_equal_answers_one_by_one(stories, stories_tokenizer):
    rows = [
        {"prompt": text, "completion": "x"}
        for text in ("Once upon a time", "Tom", "The little red bird sang a song", "A")
    ]
    task = make_task("chat", max_new_tokens=12).resolve(rows)
    stories.train()
    together = task.predict(stories, stories_tokenizer, rows, batch_size=4)
    assert stories.training
    assert together == [task.predict(stories, stories_tokenizer, [row])[0] for row in rows]
    assert len(set(together)) > 1


def test_prompt_without_room(stories, stories_tokenizer):
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(
        ValueError, match=r"row 1: the prompt has .* max_new_tokens is 512, but the model has 512 positions"
    ):
        make_task("chat", max_new_tokens=512).resolve(rows).predict(stories, stories_tokenizer, rows)


def test_evaluate_is_loss_per_supervised_token(stories, stories_tokenizer):
    rows = [
        {"prompt": "a", "completion": "It ran away"},
        {"prompt": "the dog sat", "completion": "Tim", "refs": ["Tim", "Sam"]},
    ]
    task = make_task("chat", references_column="refs", max_new_tokens=4).resolve(rows)
    encoded, total, count = task.encode(rows, stories_tokenizer), 0.0, 0
    stories.eval()
    for example in encoded.examples:
        with torch.no_grad():
            logits = stories(torch.tensor([example["input_ids"]])).logits[0]
        for position, label in enumerate(example["labels"]):
            if label != IGNORED:
                total -= F.log_softmax(logits[position - 1], -1)[label].item()
                count += 1
    found = task.evaluate(stories, stories_tokenizer, rows, batch_size=2, draws=20)
    assert found["token_loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["tokens"] == count == encoded.supervised
    assert found["token_loss_low"] <= found["token_loss"] <= found["token_loss_high"]
    assert {"bleu", "bleu_low", "chrf", "chrf_high"} <= set(found)

    batch = task.collator(stories_tokenizer)(encoded.examples)
    with torch.no_grad():
        reduced = task.reduce_logits(stories(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
    seen = task.metrics()(SimpleNamespace(predictions=reduced.numpy(), label_ids=batch["labels"].numpy()))
    assert seen["token_loss"] == pytest.approx(total / count, rel=1e-5)


def test_scores_use_every_reference():
    rows = [
        {"prompt": "a", "refs": ["the cat sat on the mat", "a cat sat down here"]},
        {"prompt": "b", "refs": ["it is a dog now"]},
    ]
    task = make_task("chat", prompt_column="prompt", completion_column="ref", references_column="refs")
    perfect = task.score(["a cat sat down here", "it is a dog now"], rows)
    assert perfect == {"bleu": pytest.approx(100.0), "chrf": pytest.approx(100.0)}
    assert task.score(["a cat sat down here", "no no no no no"], rows)["bleu"] < 90


def test_plain_template_needs_an_end_token(stories_tokenizer):
    assert "eos_token" in PLAIN_TEMPLATE
    stories_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        make_task("chat").resolve([{"prompt": "a", "completion": "b"}]).encode(
            [{"prompt": "a", "completion": "b"}], stories_tokenizer
        )
