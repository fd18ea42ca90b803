"""Plain text: documents joined by the end-of-sequence token and cut into blocks; the loss counts every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from loratory.tasks.generation import generate_texts
from loratory.tasks.likelihood import likelihood, likelihood_each, likelihood_metrics, row_losses
from loratory.tasks.rows import Rows, cell, first_row, no_columns, origin
from loratory.tasks.task import Encoded, Metrics, Task, need_supervision

KNOWN = ("text", "content", "document")


@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Language modelling on packed blocks of max_length tokens; each document ends with the end-of-sequence token."""

    name: ClassVar[str] = "text"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    best_metric: ClassVar[tuple[str, bool]] = ("token_loss", False)
    by_row: ClassVar[tuple[str, ...]] = ("token_loss",)

    text_column: str | None = None  # None: text, content or document, the first that is there
    max_new_tokens: int = 128  # when continuing a text

    def resolve(self, rows: Rows) -> Self:
        row = first_row(rows, self.name)
        column = self.text_column or next((name for name in KNOWN if name in row), None)
        if column is None:
            raise no_columns(row, self.name, "; ".join(KNOWN), "text_column=")
        for index, each in enumerate(rows):
            cell(each, index, column, "text_column")
        return replace(self, text_column=column)

    def notes(self) -> tuple[str, ...]:
        return (f"text: documents from column '{self.text_column}', packed into blocks; loss on every token",)

    def encode(self, rows: Rows, tokenizer: Any) -> Encoded:
        column = self.text_column or "text"
        first_row(rows, self.name)
        end, limit = tokenizer.eos_token_id, self.length(tokenizer)
        stream: list[int] = []
        starts: list[tuple[int, str]] = []  # where each document begins
        for index, row in enumerate(rows):
            ids = list(tokenizer(cell(row, index, column, "text_column"), verbose=False)["input_ids"])
            starts.append((len(stream), origin(row, index)))
            stream += ids if end is None or ids[-1:] == [end] else [*ids, end]
        blocks = [stream[i : i + limit] for i in range(0, len(stream), limit)]
        if blocks and len(blocks[-1]) < 2:  # one token alone predicts nothing
            blocks.pop()
        origins = [[where for at, where in starts if at <= i * limit][-1] for i in range(len(blocks))]
        examples = [{"input_ids": b, "attention_mask": [1] * len(b), "labels": list(b)} for b in blocks]
        notes = () if end is not None else ("the tokenizer has no end-of-sequence token: documents follow unmarked",)
        supervised = sum(len(block) - 1 for block in blocks)
        return need_supervision(Encoded(examples, origins, len(rows), supervised=supervised, notes=notes), self)

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        return row_losses(logits, labels, shift=1)

    def metrics(self) -> Callable[[Any], Metrics]:
        return likelihood_metrics(shift=1)

    def predict(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, **generation: Any) -> list[str]:
        """The continuation of each text."""
        texts = [cell(row, i, self.text_column or "text", "text_column") for i, row in enumerate(rows)]
        prompts = [list(tokenizer(text)["input_ids"]) for text in texts]
        end = tokenizer.eos_token_id
        prompts = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in prompts]
        origins = [origin(row, i) for i, row in enumerate(rows)]
        generation = {"max_new_tokens": self.max_new_tokens} | generation
        return generate_texts(model, tokenizer, prompts, origins=origins, batch_size=batch_size, **generation)

    def score(self, predictions: Sequence[Any], rows: Rows, *, draws: int = 0) -> Metrics:
        """Nothing: a continuation has no right answer; evaluate gives the likelihood."""
        return {}

    def score_each(self, predictions: Sequence[Any], rows: Rows, metric: str) -> list[float]:
        """Nothing, for the same reason; measure gives the loss of each block."""
        return []

    def measure(
        self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, *, metric: str
    ) -> tuple[Metrics, list[float]]:
        self.check_by_row(metric)
        encoded = self.encode(rows, tokenizer)
        return likelihood_each(model, encoded, self.collator(tokenizer), batch_size, shift=1)

    def evaluate(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, *, draws: int = 0) -> Metrics:
        encoded = self.encode(rows, tokenizer)
        return likelihood(model, encoded, self.collator(tokenizer), batch_size, shift=1, draws=draws)
