"""Token classification: entities in words tagged B-, I- and O (IOB2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from torch import Tensor

from loratory.tasks.classification import check_known
from loratory.tasks.likelihood import answering
from loratory.tasks.rows import Rows, cell, first_row, no_columns, origin
from loratory.tasks.scores import bootstrap
from loratory.tasks.task import IGNORED, Encoded, Metrics, Preview, Task, need_supervision

Positions = dict[int, int]  # word -> its first piece
TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")


@dataclass(frozen=True, kw_only=True)
class Tagging(Task):
    """One tag a word. A word's first piece carries its tag, its other pieces are masked; words cut off are tagged O."""

    name: ClassVar[str] = "tagging"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    head: ClassVar[tuple[str, ...]] = ("classifier", "score")
    best_metric: ClassVar[tuple[str, bool]] = ("f1", True)
    by_row: ClassVar[tuple[str, ...]] = ("f1",)

    tokens_column: str | None = None
    tags_column: str | None = None
    labels: tuple[str, ...] = ()  # O, then B- and I- of each entity type; found in the training rows

    def resolve(self, rows: Rows) -> Self:
        row = first_row(rows, self.name)
        tokens = self.tokens_column or next((name for name in TOKENS if name in row), None)
        tags = self.tags_column or next((name for name in TAGS if name in row), None)
        if tokens is None or tags is None:
            known = "tokens (or words), tags (or ner_tags, labels)"
            raise no_columns(row, self.name, known, "tokens_column= and tags_column=")
        task = replace(self, tokens_column=tokens, tags_column=tags)
        if self.labels:
            return task
        kinds = sorted({tag[2:] for i, each in enumerate(rows) for tag in task.tags(each, i) if tag != "O"})
        if not kinds:
            raise ValueError(f"column '{tags}' tags no word of {len(rows)} rows as an entity (B-...); check the column")
        return replace(task, labels=("O", *(f"{mark}-{kind}" for kind in kinds for mark in "BI")))

    def notes(self) -> tuple[str, ...]:
        kinds = ", ".join(label[2:] for label in self.labels if label.startswith("B-"))
        return (f"tagging: words from '{self.tokens_column}', tags from '{self.tags_column}' (entities: {kinds})",)

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def words(self, row: Mapping[str, Any], index: int = 0) -> list[str]:
        column = self.tokens_column or "tokens"
        words = cell(row, index, column, "tokens_column", (list,))
        if not words or not all(isinstance(word, str) for word in words):
            raise TypeError(f"{origin(row, index)}: column '{column}' must be a list of words, not {words!r:.60}")
        return list(words)

    def tags(self, row: Mapping[str, Any], index: int = 0) -> list[str]:
        """The row's tags, after checking them as strict IOB2."""
        words, column = self.words(row, index), self.tags_column or "tags"
        tags = list(cell(row, index, column, "tags_column", (list,)))
        if len(tags) != len(words):
            raise ValueError(
                f"{origin(row, index)}: {len(words)} words but {len(tags)} tags in column '{column}'; correct the row"
            )
        before = "O"
        for number, (word, tag) in enumerate(zip(words, tags, strict=True), 1):
            where = f"{origin(row, index)}, word {number} '{word}': tag {tag!r}"
            if not isinstance(tag, str) or not (tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)):
                raise ValueError(f"{where} is none of O, B-<type> and I-<type>; correct it")
            if tag.startswith("I-") and before[2:] != tag[2:]:
                raise ValueError(f"{where} follows '{before}', but entities begin with B- (IOB2); correct it")
            before = tag
        return tags

    def encode(self, rows: Rows, tokenizer: Any) -> Encoded:
        first_row(rows, self.name)
        ids = {label: index for index, label in enumerate(self.labels)}
        tags = self._known_tags(rows)
        examples, origins, truncated, dropped = [], [], 0, 0
        for index, (row, row_tags) in enumerate(zip(rows, tags, strict=True)):
            example, firsts, cut = self._pieces(row, index, tokenizer)
            truncated += cut
            if not firsts:
                dropped += 1
                continue
            example["labels"] = [IGNORED] * len(example["input_ids"])
            for word, position in firsts.items():
                example["labels"][position] = ids[row_tags[word]]
            examples.append(example)
            origins.append(origin(row, index))
        supervised = sum(label != IGNORED for example in examples for label in example["labels"])
        return need_supervision(Encoded(examples, origins, len(rows), truncated, dropped, supervised), self)

    def _known_tags(self, rows: Rows) -> list[list[str]]:
        tags = [self.tags(row, i) for i, row in enumerate(rows)]
        check_known({tag: origin(rows[i], i) for i in reversed(range(len(rows))) for tag in tags[i]}, self.labels)
        return tags

    def _pieces(self, row: Mapping[str, Any], index: int, tokenizer: Any) -> tuple[dict[str, Any], Positions, bool]:
        """The encoded words, the position of each word's first piece, and whether words were cut off."""
        if not tokenizer.is_fast:
            raise TypeError(f"{type(tokenizer).__name__} cannot tell which piece is of which word; use a fast one")
        words = self.words(row, index)
        output = tokenizer(words, is_split_into_words=True, truncation=True, max_length=self.length(tokenizer))
        firsts: Positions = {}
        for position, word in enumerate(output.word_ids()):
            if word is not None:
                firsts.setdefault(word, position)
        return dict(output), firsts, bool(output.encodings[0].overflowing)

    def preview(self, encoded: Encoded, tokenizer: Any, index: int = 0) -> Preview:
        """Pieces, each supervised one followed by its tag."""
        example = encoded[index]
        pieces: list[tuple[str, bool]] = []
        names = tokenizer.convert_ids_to_tokens(example["input_ids"])
        for name, label in zip(names, example["labels"], strict=True):
            supervised = label != IGNORED
            pieces += [(f"{name}/{self.labels[label]}" if supervised else name, supervised), (" ", False)]
        return Preview(tuple(pieces[:-1]), self.counts(encoded))

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def metrics(self) -> Callable[[Any], Metrics]:
        names = np.array(self.labels, dtype=object)

        def compute(prediction: Any) -> Metrics:
            rows = list(zip(np.asarray(prediction.predictions), np.asarray(prediction.label_ids), strict=True))
            guess = [names[row[label != IGNORED]].tolist() for row, label in rows]
            right = [names[label[label != IGNORED]].tolist() for _, label in rows]
            return entity_scores(guess, right)

        return compute

    def predict(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8) -> list[list[str]]:
        """Tags of every word of each row."""
        inputs = [self._pieces(row, i, tokenizer)[:2] for i, row in enumerate(rows)]
        collate, found = self.collator(tokenizer), []
        with answering(model):
            for start in range(0, len(rows), batch_size):
                batch = collate([example for example, _ in inputs[start : start + batch_size]])
                logits = model(**{key: value.to(model.device) for key, value in batch.items()}).logits
                found += logits.argmax(-1).tolist()
        return [
            [self.labels[best[firsts[word]]] if word in firsts else "O" for word in range(len(self.words(row, i)))]
            for i, (row, best, (_, firsts)) in enumerate(zip(rows, found, inputs, strict=True))
        ]

    def score(self, predictions: Sequence[Any], rows: Rows, *, draws: int = 0) -> Metrics:
        """Precision, recall and F1 of whole entities: type and both ends must be right."""
        return entity_scores(predictions, self._known_tags(rows), draws=draws)

    def score_each(self, predictions: Sequence[Any], rows: Rows, metric: str) -> list[float]:
        """F1 of each sentence's entities; 1 where it has none and none was found. Their mean is not the F1 of all entities."""
        counts = entity_counts(predictions, self._known_tags(rows))
        return [float(2 * hits / (guessed + real)) if guessed + real else 1.0 for hits, guessed, real in counts]


def entity_scores(guess: Sequence[Sequence[str]], right: Sequence[Sequence[str]], *, draws: int = 0) -> Metrics:
    """precision, recall and f1 over entities as seqeval reads them in its strict IOB2 mode."""
    counts = entity_counts(guess, right)

    def rates(rows: Any) -> Metrics:
        hits, guessed, real = counts[rows].sum(0).tolist()
        rate = {"precision": hits / guessed if guessed else 0.0, "recall": hits / real if real else 0.0}
        return rate | {"f1": 2 * hits / (guessed + real) if guessed + real else 0.0}

    return bootstrap(rates, len(counts), draws)


def entity_counts(guess: Sequence[Sequence[str]], right: Sequence[Sequence[str]]) -> Any:
    """(rows, 3): entities found and right, found, and there, in each row."""
    try:
        from seqeval.scheme import IOB2, Entities
    except ImportError as error:
        raise ImportError("entity F1 needs seqeval; run: pip install 'loratory[metrics]'") from error
    sets = [
        [{entity.to_tuple()[1:] for entity in row} for row in Entities([list(t) for t in tags], scheme=IOB2).entities]
        for tags in (guess, right)
    ]
    return np.array([[len(a & b), len(a), len(b)] for a, b in zip(*sets, strict=True)])
