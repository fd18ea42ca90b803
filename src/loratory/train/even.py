"""The same steps on several processes as on one: rows in the same order, every row once, each counting the same.

Every process must have a batch at every step, so the last step of an epoch is filled up with rows that count nothing. Where the
model takes the mean over its own batch (it is not told how many labels there are in all), the processes' means are weighed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import Sampler

from loratory.runtime.shards import processes
from loratory.tasks.task import IGNORED


class EvenSampler(Sampler[int]):
    """The order that one process has, and numbers beyond the rows until `together` divides the length."""

    def __init__(self, rows: Any, seed: int, together: int) -> None:
        self.order = SeedableRandomSampler(rows, data_seed=seed)
        self.fill = range(len(rows), -(-len(rows) // together) * together)

    def __iter__(self) -> Iterator[int]:
        yield from self.order
        yield from self.fill

    def __len__(self) -> int:
        return len(self.order) + len(self.fill)

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)


def uncounted(example: dict[str, Any]) -> dict[str, Any]:
    """The example with labels that the loss leaves out."""
    labels = example["labels"]
    return {**example, "labels": IGNORED if isinstance(labels, int) else [IGNORED] * len(labels)}


def weigh(loss: Tensor, labels: Tensor) -> Tensor:
    """A mean over this process's labels, so weighed that the mean over the processes is that over all labels."""
    counts = (labels != IGNORED).sum().to(loss.dtype)
    total = counts.clone()
    torch.distributed.all_reduce(total)
    return torch.where(counts > 0, loss, 0.0) * counts * processes() / total
