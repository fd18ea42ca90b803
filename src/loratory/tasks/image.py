"""Image classification: one label for an image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from loratory.tasks.classification import LABELS, check_known, class_scores
from loratory.tasks.likelihood import answering
from loratory.tasks.pictures import Picture, picture
from loratory.tasks.rows import Rows, cell, first_row, no_columns, origin
from loratory.tasks.scores import bootstrap
from loratory.tasks.task import Collator, Encoded, Metrics, Preview, Task

IMAGES = ("image", "img", "picture")


@dataclass(frozen=True)
class EncodedPictures(Encoded):
    """Images beside their labels' numbers; pixels are made when an example is asked for, so they need not fit into memory."""

    processor: Any = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.examples[index]
        return {"pixel_values": pixel_values([example["image"]], self.processor)[0], "labels": example["labels"]}

    def size(self, index: int) -> int:
        return 1


def pixel_values(pictures: Sequence[Picture], processor: Any) -> Tensor:
    """What the model's image processor makes of some images: (n, channels, height, width)."""
    made = [processor(images=each.open(), return_tensors="pt")["pixel_values"][0] for each in pictures]
    return stacked(made)


def stacked(made: Sequence[Tensor]) -> Tensor:
    if len({each.shape for each in made}) > 1:
        raise ValueError(
            f"the image processor leaves images of different sizes ({tuple(made[0].shape)} and others); give it a fixed size "
            "(do_resize with height and width, or do_center_crop, in preprocessor_config.json)"
        )
    return torch.stack(list(made))


def stack_examples(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Collator: a batch of pixels, and of labels."""
    labels = torch.tensor([example["labels"] for example in examples])
    return {"pixel_values": stacked([example["pixel_values"] for example in examples]), "labels": labels}


@dataclass(frozen=True, kw_only=True)
class Image(Task):
    """One of `labels` for each image; labels are text or whole numbers, and kept as text. Images are read as RGB."""

    name: ClassVar[str] = "image"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    processor_class: ClassVar[str] = "AutoImageProcessor"
    unit: ClassVar[str] = "images"
    head: ClassVar[tuple[str, ...]] = ("classifier", "cls_classifier", "distillation_classifier", "head", "fc")
    best_metric: ClassVar[tuple[str, bool]] = ("accuracy", True)
    by_row: ClassVar[tuple[str, ...]] = ("accuracy",)

    max_length: None = None  # not for images: their size is the model's image processor's
    image_column: str | None = None  # an image, or the path of one
    label_column: str | None = None
    labels: tuple[str, ...] = ()  # in the order of the model's outputs; found in the training rows

    def __post_init__(self) -> None:
        if self.max_length is not None:
            raise ValueError(
                "max_length is for texts; the size of images is set in the model's preprocessor_config.json"
            )

    def resolve(self, rows: Rows) -> Self:
        row = first_row(rows, self.name)
        image = self.image_column or next((name for name in IMAGES if name in row), None)
        label = self.label_column or next((name for name in LABELS if name in row), None)
        if image is None or label is None:
            known = f"{', '.join(IMAGES)}; with {', '.join(LABELS)}"
            raise no_columns(row, self.name, known, "image_column= and label_column=")
        task = replace(self, image_column=image, label_column=label)
        if self.labels:
            return task
        found = {task.label(each, index) for index, each in enumerate(rows)}
        if len(found) < 2:
            raise ValueError(f"column '{label}' holds only the label '{min(found)}'; at least two are needed")
        numbers = all(name.lstrip("-").isdigit() for name in found)
        return replace(task, labels=tuple(sorted(found, key=int) if numbers else sorted(found)))

    def notes(self) -> tuple[str, ...]:
        return (
            f"image: images from '{self.image_column}', label from '{self.label_column}' ({len(self.labels)} labels)",
        )

    def model_kwargs(self) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
            "ignore_mismatched_sizes": True,  # image classifiers come with a head of their own, for other labels
        }

    def collator(self, tokenizer: Any) -> Collator:
        return stack_examples

    def label(self, row: Mapping[str, Any], index: int = 0) -> str:
        """The row's label as text."""
        return str(cell(row, index, self.label_column or "label", "label_column", (str, int)))

    def picture(self, row: Mapping[str, Any], index: int = 0) -> Picture:
        """The row's image, still as it is stored."""
        column = self.image_column or "image"
        value = cell(row, index, column, "image_column", (object,))
        return picture(value, origin(row, index))

    def encode(self, rows: Rows, tokenizer: Any) -> EncodedPictures:
        """Images and numbers of labels; tokenizer is the model's image processor. Every image's beginning is read."""
        first_row(rows, self.name)
        self._check_labels(rows)
        ids = {label: index for index, label in enumerate(self.labels)}
        pictures = [self.picture(row, i) for i, row in enumerate(rows)]
        for each in pictures:
            each.check()
        examples = [{"image": each, "labels": ids[self.label(rows[i], i)]} for i, each in enumerate(pictures)]
        origins = [origin(row, i) for i, row in enumerate(rows)]
        return EncodedPictures(examples, origins, len(rows), supervised=len(rows), processor=tokenizer)

    def _check_labels(self, rows: Rows) -> None:
        check_known({self.label(row, i): origin(row, i) for i, row in reversed(list(enumerate(rows)))}, self.labels)

    def counts(self, encoded: Encoded) -> str:
        numbers = np.bincount([example["labels"] for example in encoded.examples], minlength=len(self.labels))
        return f"{encoded.rows} images, {numbers.min()} to {numbers.max()} of each label"

    def preview(self, encoded: Encoded, tokenizer: Any, index: int = 0) -> Preview:
        example = encoded.examples[index]
        shape = " x ".join(map(str, encoded[index]["pixel_values"].shape))
        text = f"{example['image'].name} ({example['image'].check()}, for the model {shape}) -> "
        return Preview(((text, False), (self.labels[example["labels"]], True)), self.counts(encoded))

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def metrics(self) -> Callable[[Any], Metrics]:
        return lambda prediction: class_scores(prediction.predictions, prediction.label_ids)

    def predict(self, model: Any, tokenizer: Any, rows: Rows, batch_size: int = 8) -> list[str]:
        pictures = [self.picture(row, i) for i, row in enumerate(rows)]
        found: list[str] = []
        with answering(model):
            for start in range(0, len(pictures), batch_size):
                batch = pixel_values(pictures[start : start + batch_size], tokenizer)
                logits = model(pixel_values=batch.to(model.device, model.dtype)).logits
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
