"""Sequence classification: one label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from loratory.tasks.likelihood import answering
from loratory.tasks.rows import Rows, cell, first_row, no_columns, origin
from loratory.tasks.scores import bootstrap
from loratory.tasks.task import Encoded, Metrics, Preview, Task, need_supervision

PAIRS = (("text1", "text2"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
TEXTS = ("text", "sentence")
LABELS = ("label", "labels")


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """One of `labels` for each row; labels are text or whole numbers, and kept as text."""

    name: ClassVar[str] = "classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    head: ClassVar[tuple[str, ...]] = ("classifier", "pre_classifier", "score")
    best_metric: ClassVar[tuple[str, bool]] = ("accuracy", True)
    by_row: ClassVar[tuple[str, ...]] = ("accuracy",)

    text_column: str | None = None
    pair_column: str | None = None  # the second text
    label_column: str | None = None
    labels: tuple[str, ...] = ()  # in the order of the model's outputs; found in the training rows

    def resolve(self, rows: Rows) -> Self:
        row = first_row(rows, self.name)
        text, pair = self.text_column, self.pair_column
        if text is None:
            for left, right in PAIRS:
                if left in row and right in row:
                    text, pair = left, pair or right
                    break
            else:
                text = next((name for name in TEXTS if name in row), None)
        label = self.label_column or next((name for name in LABELS if name in row), None)
        if text is None or label is None:
            tried = "; ".join(TEXTS) + "; " + "; ".join(", ".join(names) for names in PAIRS) + "; with label"
            raise no_columns(row, self.name, tried, "text_column= and label_column=")
        task = replace(self, text_column=text, pair_column=pair, label_column=label)
        if self.labels:
            return task
        found = {task.label(each, index) for index, each in enumerate(rows)}
        if len(found) < 2:
            raise ValueError(f"column '{label}' holds only the label '{min(found)}'; at least two are needed")
        numbers = all(name.lstrip("-").isdigit() for name in found)
        return replace(task, labels=tuple(sorted(found, key=int) if numbers else sorted(found)))

    def notes(self) -> tuple[str, ...]:
        texts = f"'{self.text_column}'" + (f" and '{self.pair_column}'" if self.pair_column else "")
        return (f"classification: text from {texts}, label from '{self.label_column}' ({len(self.labels)} labels)",)

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def label(self, row: Mapping[str, Any], index: int = 0) -> str:
        """The row's label as text."""
        return str(cell(row, index, self.label_column or "label", "label_column", (str, int)))

    def encode(self, rows: Rows, tokenizer: Any) -> Encoded:
        first_row(rows, self.name)
        inputs, truncated = self._inputs(rows, tokenizer)
        ids = {label: index for index, label in enumerate(self.labels)}
        self._check_labels(rows)
        numbers = [ids[self.label(row, i)] for i, row in enumerate(rows)]
        examples = [example | {"labels": number} for example, number in zip(inputs, numbers, strict=True)]
        origins = [origin(row, i) for i, row in enumerate(rows)]
        return need_supervision(Encoded(examples, origins, len(rows), truncated, 0, len(examples)), self)

    def _check_labels(self, rows: Rows) -> None:
        check_known({self.label(row, i): origin(row, i) for i, row in reversed(list(enumerate(rows)))}, self.labels)

    def _inputs(self, rows: Rows, tokenizer: Any) -> tuple[list[dict[str, Any]], int]:
        limit = self.length(tokenizer)
        examples, truncated = [], 0
        for index, row in enumerate(rows):
            texts = [cell(row, index, self.text_column or "text", "text_column")]
            if self.pair_column:
                texts.append(cell(row, index, self.pair_column, "pair_column"))
            example = dict(tokenizer(*texts, verbose=False))
            if len(example["input_ids"]) > limit:
                truncated += 1
                example = dict(tokenizer(*texts, truncation=True, max_length=limit))
            if not example["input_ids"]:
                raise ValueError(f"{origin(row, index)}: the text has no tokens; give it some text")
            examples.append(example)
        return examples, truncated

    def preview(self, encoded: Encoded, tokenizer: Any, index: int = 0) -> Preview:
        example = encoded[index]
        text = tokenizer.decode(example["input_ids"])
        return Preview(((text + " -> ", False), (self.labels[example["labels"]], True)), self.counts(encoded))

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def metrics(self) -> Callable[[Any], Metrics]:
        return lambda prediction: class_scores(prediction.predictions, prediction.label_ids)

    def predict(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8) -> list[str]:
        inputs, _ = self._inputs(rows, tokenizer)
        collate = self.collator(tokenizer)
        found: list[str] = []
        with answering(model):
            for start in range(0, len(inputs), batch_size):
                batch = collate(inputs[start : start + batch_size])
                logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits
                found += [self.labels[index] for index in logits.argmax(-1).tolist()]
        return found

    def score(self, predictions: Sequence[Any], rows: Rows, *, draws: int = 0) -> Metrics:
        """Accuracy, and F1 averaged over the labels that occur."""
        self._check_labels(rows)
        truth = [self.label(row, i) for i, row in enumerate(rows)]
        ids = {label: index for index, label in enumerate(sorted({*truth, *predictions}))}
        guess, right = (np.array([ids[label] for label in labels]) for labels in (predictions, truth))
        return bootstrap(lambda chosen: class_scores(guess[chosen], right[chosen]), len(rows), draws)

    def score_each(self, predictions: Sequence[Any], rows: Rows, metric: str) -> list[float]:
        """1 where the label is right, else 0: their mean is the accuracy."""
        return [
            float(guess == self.label(row, i)) for i, (guess, row) in enumerate(zip(predictions, rows, strict=True))
        ]


def class_scores(guess: Any, right: Any) -> Metrics:
    """accuracy and macro_f1 of two arrays of label numbers; labels in neither array do not count."""
    guess, right = np.asarray(guess), np.asarray(right)
    size = int(max(guess.max(), right.max())) + 1
    hits = np.bincount(right[guess == right], minlength=size)
    seen = np.bincount(guess, minlength=size) + np.bincount(right, minlength=size)
    f1 = 2 * hits[seen > 0] / seen[seen > 0]
    return {"accuracy": float((guess == right).mean()), "macro_f1": float(f1.mean())}


def check_known(found: Mapping[str, str], labels: Sequence[str]) -> None:
    """Raises ValueError if a label (label -> where it stands) is not among those of training."""
    unseen = sorted(set(found) - set(labels))
    if unseen:
        names = ", ".join(f"'{label}'" for label in unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        known = ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")
        raise ValueError(
            f"{found[unseen[0]]}: {names} {'was' if len(unseen) == 1 else 'were'} not seen in training, which has "
            f"{len(labels)} labels ({known}); add training rows with it, or take these rows out"
        )
