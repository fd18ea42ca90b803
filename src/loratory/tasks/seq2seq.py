"""Sequence to sequence: an encoder reads the input, the loss counts the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from loratory.tasks.generation import generate_texts
from loratory.tasks.likelihood import likelihood, likelihood_each, likelihood_metrics, row_losses
from loratory.tasks.rows import Rows, cell, first_row, no_columns, origin
from loratory.tasks.scores import sentence_scores, translation_scores
from loratory.tasks.task import Encoded, Metrics, Preview, Task, need_supervision

PAIRS = (("input", "target"), ("source", "target"), ("text", "summary"), ("question", "answer"))


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(Task):
    """A target text for an input text, by an encoder-decoder model."""

    name: ClassVar[str] = "seq2seq"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    best_metric: ClassVar[tuple[str, bool]] = ("token_loss", False)
    by_row: ClassVar[tuple[str, ...]] = ("token_loss", "bleu", "chrf")

    input_column: str | None = None
    target_column: str | None = None
    input_prefix: str = ""  # text before every input, e.g. "summarize: "
    max_target_length: int = 128  # tokens, in training and when answering

    def resolve(self, rows: Rows) -> Self:
        row = first_row(rows, self.name)
        source, target = self.input_column, self.target_column
        for left, right in PAIRS:
            if (source or left in row) and (target or right in row):
                source, target = source or left, target or right
                break
        if source is None or target is None:
            known = "; ".join(", ".join(pair) for pair in PAIRS)
            raise no_columns(row, self.name, known, "input_column= and target_column=")
        task = replace(self, input_column=source, target_column=target)
        for index, each in enumerate(rows):
            task.source(each, index), task.target(each, index)
        return task

    def notes(self) -> tuple[str, ...]:
        return (f"seq2seq: input from '{self.input_column}', target from '{self.target_column}'; loss on the target",)

    def source(self, row: Mapping[str, Any], index: int = 0) -> str:
        return self.input_prefix + str(cell(row, index, self.input_column or "input", "input_column"))

    def target(self, row: Mapping[str, Any], index: int = 0) -> str:
        return str(cell(row, index, self.target_column or "target", "target_column"))

    def _input_ids(self, row: Mapping[str, Any], index: int, tokenizer: Any) -> tuple[list[int], bool]:
        limit, text = self.length(tokenizer), self.source(row, index)
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        if len(ids) <= limit:
            return ids, False
        return list(tokenizer(text, truncation=True, max_length=limit)["input_ids"]), True

    def encode(self, rows: Rows, tokenizer: Any) -> Encoded:
        first_row(rows, self.name)
        examples, truncated = [], 0
        for index, row in enumerate(rows):
            ids, cut = self._input_ids(row, index, tokenizer)
            labels = list(tokenizer(text_target=self.target(row, index), verbose=False)["input_ids"])
            truncated += cut or len(labels) > self.max_target_length
            labels = labels[: self.max_target_length]
            examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        origins = [origin(row, i) for i, row in enumerate(rows)]
        supervised = sum(len(example["labels"]) for example in examples)
        return need_supervision(Encoded(examples, origins, len(rows), truncated, 0, supervised), self)

    def preview(self, encoded: Encoded, tokenizer: Any, index: int = 0) -> Preview:
        example = encoded[index]
        pieces = ((tokenizer.decode(example["input_ids"]) + " -> ", False), (tokenizer.decode(example["labels"]), True))
        return Preview(pieces, self.counts(encoded))

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        return row_losses(logits, labels, shift=0)

    def metrics(self) -> Callable[[Any], Metrics]:
        return likelihood_metrics(shift=0)

    def predict(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, **generation: Any) -> list[str]:
        prompts = [self._input_ids(row, i, tokenizer)[0] for i, row in enumerate(rows)]
        origins = [origin(row, i) for i, row in enumerate(rows)]
        generation = {"max_new_tokens": self.max_target_length} | generation
        return generate_texts(model, tokenizer, prompts, origins=origins, batch_size=batch_size, **generation)

    def score(self, predictions: Sequence[Any], rows: Rows, *, draws: int = 0) -> Metrics:
        """BLEU and chrF against the targets."""
        return translation_scores(predictions, [[self.target(row, i)] for i, row in enumerate(rows)], draws=draws)

    def score_each(self, predictions: Sequence[Any], rows: Rows, metric: str) -> list[float]:
        """BLEU (smoothed for single sentences) or chrF of each answer; their mean is not the score of all answers together."""
        references = [[self.target(row, i)] for i, row in enumerate(rows)]
        return sentence_scores(predictions, references, metric)

    def measure(
        self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, *, metric: str
    ) -> tuple[Metrics, list[float]]:
        if metric != "token_loss":
            return super().measure(model, tokenizer, rows, batch_size, metric=metric)
        encoded = self.encode(rows, tokenizer)
        return likelihood_each(model, encoded, self.collator(tokenizer), batch_size, shift=0)

    def evaluate(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, *, draws: int = 0) -> Metrics:
        encoded = self.encode(rows, tokenizer)
        losses = likelihood(model, encoded, self.collator(tokenizer), batch_size, shift=0, draws=draws)
        return losses | super().evaluate(model, tokenizer, rows, batch_size, draws=draws)
