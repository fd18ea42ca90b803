"""Loss and perplexity for each supervised token: summed over rows, so that batch size and padding do not matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from loratory.tasks.scores import bootstrap
from loratory.tasks.task import IGNORED, Collator, Encoded, Metrics


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Without gradients and dropout; the model's training flag is put back afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def row_losses(logits: Any, labels: Tensor, *, shift: int) -> Tensor:
    """Summed negative log-likelihood of each row's labels; shift 1 where position t predicts label t + 1."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    steps = logits.shape[1] - shift
    losses = [  # row by row: a float32 copy of all logits would be the largest tensor of the evaluation
        F.cross_entropy(row[:steps].float(), label[shift:], ignore_index=IGNORED, reduction="sum")
        for row, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses)


def likelihood_metrics(*, shift: int) -> Callable[[Any], Metrics]:
    """Trainer's compute_metrics for logits reduced by row_losses."""

    def compute(prediction: Any) -> Metrics:
        counts = (np.asarray(prediction.label_ids)[:, shift:] != IGNORED).sum()
        return _rates(np.asarray(prediction.predictions).sum(), counts)

    return compute


def likelihood(
    model: Any, encoded: Encoded, collate: Collator, batch_size: int = 8, *, shift: int, draws: int = 0
) -> Metrics:
    """token_loss, perplexity and tokens of encoded rows."""
    loss, count = sums_of_rows(model, encoded, collate, batch_size, shift=shift)
    metrics = bootstrap(lambda rows: _rates(loss[rows].sum(), count[rows].sum()), len(loss), draws)
    return metrics | {"tokens": float(count.sum())}


def likelihood_each(
    model: Any, encoded: Encoded, collate: Collator, batch_size: int = 8, *, shift: int
) -> tuple[Metrics, list[float]]:
    """The same, and the loss of each example alone: nats for each of its supervised tokens."""
    loss, count = sums_of_rows(model, encoded, collate, batch_size, shift=shift)
    return _rates(loss.sum(), count.sum()) | {"tokens": float(count.sum())}, (loss / np.maximum(count, 1)).tolist()


def sums_of_rows(
    model: Any, encoded: Encoded, collate: Collator, batch_size: int, *, shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss and number of supervised tokens of each example; examples of one length are run together."""
    loss, count = np.zeros(len(encoded)), np.zeros(len(encoded), dtype=int)
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    with answering(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = {key: value.to(model.device) for key, value in collate([encoded[i] for i in chosen]).items()}
            labels = batch["labels"]
            if shift:  # a decoder alone needs labels only for a loss of its own, which is not used
                del batch["labels"]
            loss[chosen] = row_losses(model(**batch).logits, labels, shift=shift).tolist()
            count[chosen] = (labels[:, shift:] != IGNORED).sum(1).tolist()
    return loss, count


def _rates(loss: float, tokens: float) -> Metrics:
    rate = float(loss / tokens) if tokens else math.nan
    return {"token_loss": rate, "perplexity": math.exp(min(rate, 700.0))}  # exp overflows float64 above 709
