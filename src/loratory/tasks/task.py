"""What every task shares: rows go in, padded batches, metrics and predictions come out.

A task is a frozen dataclass of settings. `resolve` fills in what the training rows decide (columns, labels) and
returns a new task, whose `settings()` are plain JSON: a task rebuilt from them encodes and scores as the trained one.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from loratory.tasks.rows import Rows, first_row

IGNORED = -100  # the label that torch's cross entropy leaves out
DEFAULT_LENGTH = 512
Metrics = dict[str, float]
Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]  # examples -> batch


@dataclass(frozen=True)
class Preview:
    """One example as pieces of text, each with its loss mask; prints with the supervised pieces in [[ ]]."""

    pieces: tuple[tuple[str, bool], ...]  # (text, is supervised)
    summary: str

    def __str__(self) -> str:
        shown = "".join(f"[[{text}]]" if supervised else text for text, supervised in self.pieces)
        return f"{shown}\n({self.summary}; the loss counts what stands in [[ ]])"


@dataclass(frozen=True)
class Encoded(Dataset):
    """Encoded rows: a torch dataset of dicts of lists, with counts. `origins[i]` says where example i came from."""

    examples: list[dict[str, Any]]  # input_ids, attention_mask, labels (and what else the model takes)
    origins: list[str]
    rows: int
    truncated: int = 0  # rows cut at max_length
    dropped: int = 0  # rows left out, because nothing in them was left to learn
    supervised: int = 0  # tokens (or rows, in classification) that the loss counts
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]

    @property
    def tokens(self) -> int:
        return sum(self.size(index) for index in range(len(self)))

    def size(self, index: int) -> int:
        """Tokens of one example (or what else the task counts: see Task.unit)."""
        return len(self.examples[index]["input_ids"])


@dataclass(frozen=True)
class PadBatch:
    """Collator: pads every list to the longest of the batch and makes tensors."""

    pad_id: int
    side: str = "right"  # "left" for generation

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = {}
        for key, first in examples[0].items():
            values = [example[key] for example in examples]
            if isinstance(first, int):
                batch[key] = torch.tensor(values)
                continue
            fill = self.pad_id if key == "input_ids" else IGNORED if key == "labels" else 0
            longest = max(len(value) for value in values)
            pads = [[fill] * (longest - len(value)) for value in values]
            joined = zip(pads, values, strict=True) if self.side == "left" else zip(values, pads, strict=True)
            batch[key] = torch.tensor([[*first_part, *second] for first_part, second in joined], dtype=torch.long)
        return batch


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """One kind of problem: its data format, its model class, its loss mask, its metrics."""

    name: ClassVar[str]
    auto_class: ClassVar[str]  # name of the transformers Auto class
    processor_class: ClassVar[str] = (
        "AutoTokenizer"  # what makes the model's input: the `tokenizer` of the methods below
    )
    unit: ClassVar[str] = "tokens"  # what the speed of a run is counted in
    head: ClassVar[tuple[str, ...]] = ()  # modules that may start random and are then trained in full
    best_metric: ClassVar[tuple[str, bool]]  # (key of metrics() and evaluate(), greater is better)
    by_row: ClassVar[
        tuple[str, ...]
    ]  # the metrics that `measure` also gives for each row alone; the first is best_metric's

    max_length: int | None = None  # tokens an example; None: 512, or the tokenizer's own limit if that is lower

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}, but an example needs at least 2 tokens; raise it")

    # -- what each task writes -------------------------------------------------------------------------------------

    @abstractmethod
    def resolve(self, rows: Rows) -> Self:
        """The task with its columns (and labels) taken from the training rows. Raises ValueError naming a bad row."""

    @abstractmethod
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user: which columns are read as what."""

    @abstractmethod
    def encode(self, rows: Rows, tokenizer: Any) -> Encoded:
        """Tokens, masks and labels of the rows. Raises ValueError if no example has anything for the loss to count."""

    @abstractmethod
    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """What of the logits `metrics` needs (Trainer's preprocess_logits_for_metrics)."""

    @abstractmethod
    def metrics(self) -> Callable[[Any], Metrics]:
        """Trainer's compute_metrics, made for the reduced logits."""

    @abstractmethod
    def predict(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8) -> list[Any]:
        """One answer for each row, in the rows' order."""

    @abstractmethod
    def score(self, predictions: Sequence[Any], rows: Rows, *, draws: int = 0) -> Metrics:
        """Metrics of predictions already made; with draws, each with its bootstrap 95 % interval (_low, _high)."""

    def evaluate(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, *, draws: int = 0) -> Metrics:
        """Held-out metrics of the model on these rows."""
        first_row(rows, self.name)
        return self.score(self.predict(model, tokenizer, rows, batch_size), rows, draws=draws)

    @abstractmethod
    def score_each(self, predictions: Sequence[Any], rows: Rows, metric: str) -> list[float]:
        """One of `by_row` for each row alone, in the rows' order and in the metric's unit."""

    def measure(
        self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8, *, metric: str
    ) -> tuple[Metrics, list[float]]:
        """Held-out metrics, `metric` among them, and `metric` for each row alone. Raises ValueError for one that is not in `by_row`."""
        self.check_by_row(metric)
        found = self.predict(model, tokenizer, rows, batch_size)
        return self.score(found, rows), self.score_each(found, rows, metric)

    def check_by_row(self, metric: str) -> None:
        if metric not in self.by_row:
            raise ValueError(
                f"task '{self.name}' does not measure '{metric}' row by row; choose {' or '.join(self.by_row)}"
            )

    # -- what all tasks share --------------------------------------------------------------------------------------

    def model_kwargs(self) -> dict[str, Any]:
        """Keywords for the Auto class, e.g. num_labels."""
        return {}

    def head_modules(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the model's modules that are this task's head."""
        return tuple(name for name, _ in model.named_modules() if name in self.head)

    def collator(self, tokenizer: Any) -> Collator:
        """Makes right-padded batches of encoded examples."""
        return PadBatch(pad_id(tokenizer))

    def settings(self) -> dict[str, Any]:
        """The fields as plain JSON values, with the task's name: make_task(**settings) gives the same task."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def preview(self, encoded: Encoded, tokenizer: Any, index: int = 0) -> Preview:
        """One example as text, with its loss mask."""
        example = encoded[index]
        pieces: list[tuple[list[int], bool]] = []
        for token, label in zip(example["input_ids"], example["labels"], strict=True):
            supervised = label != IGNORED
            if not pieces or pieces[-1][1] != supervised:
                pieces.append(([], supervised))
            pieces[-1][0].append(token)
        return Preview(tuple((tokenizer.decode(ids), mask) for ids, mask in pieces), self.counts(encoded))

    def counts(self, encoded: Encoded) -> str:
        """One line: rows, truncated, dropped, tokens, supervised."""
        parts = [f"{encoded.rows} rows", f"{len(encoded)} examples", f"{encoded.truncated} truncated"]
        parts += [f"{encoded.dropped} dropped", f"{encoded.tokens} tokens", f"{encoded.supervised} supervised"]
        return ", ".join(parts)

    def length(self, tokenizer: Any) -> int:
        """max_length, checked against the model's limit as the tokenizer knows it."""
        limit = tokenizer.model_max_length
        if self.max_length is None:
            return min(DEFAULT_LENGTH, limit)
        if self.max_length > limit:
            raise ValueError(f"max_length is {self.max_length}, but this model reads at most {limit} tokens; lower it")
        return self.max_length


def pad_id(tokenizer: Any) -> int:
    """The padding token's id; the end-of-sequence token stands in, because padding is masked anyway."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise ValueError("the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token")
    return int(found)


def need_supervision(encoded: Encoded, task: Task) -> Encoded:
    """The same, after checking that the loss has something to count."""
    if encoded.supervised == 0:
        raise ValueError(
            f"task '{task.name}': no token of the {encoded.rows} rows is supervised ({encoded.dropped} rows dropped, "
            f"{encoded.truncated} truncated), so there is nothing to learn; raise max_length or check the columns"
        )
    return encoded
