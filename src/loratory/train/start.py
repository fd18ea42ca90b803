"""How a run's adapter starts: the method with what it takes from the run, and from the training rows where it needs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import loratory as lt
from loratory.methods.method import Method
from loratory.methods.registry import method_class
from loratory.runtime.shards import processes
from loratory.tasks import Encoded, Task
from loratory.train import checkpoint as ckpt
from loratory.train.prints import significant
from loratory.train.settings import ADAPT_OPTIONS, TrainSettings


def planned_method(settings: TrainSettings, rows: int) -> Method:
    """The chosen method, with what it takes from the run."""
    own = {key: value for key, value in settings.method_options.items() if key not in ADAPT_OPTIONS}
    steps = steps_of(settings, rows)
    warmup = settings.warmup_steps if settings.warmup_steps < 1 else settings.warmup_steps / steps
    return method_class(settings.method)(**own).planned(
        learning_rate=settings.learning_rate, warmup=warmup, steps=steps
    )


def steps_of(settings: TrainSettings, rows: int) -> int:
    """Optimizer steps of a whole run."""
    if settings.max_steps > 0:
        return settings.max_steps
    batches = -(-rows // (settings.per_device_train_batch_size * processes()))
    epoch = max(1, -(-batches // settings.gradient_accumulation_steps))
    return max(1, math.ceil(epoch * settings.num_train_epochs))


def own_checkpoint(settings: TrainSettings) -> Path | None:
    """The checkpoint that this run will go on from, which holds its start already."""
    found = ckpt.last_checkpoint(settings.output_dir) if settings.resume else None
    if found is None or ckpt.read_state(found)[0]["run"]["settings"] != significant(settings):
        return None
    return found


def collected(
    model: Any,
    method: Method,
    place: dict[str, Any],
    settings: TrainSettings,
    task: Task,
    encoded: Encoded,
    tokenizer: Any,
    say: Callable[[str], None],
) -> Any:
    """What the method needs of the training rows: of as many as its paper takes, chosen by the run's seed."""
    count = min(method.rows_to_collect or len(encoded), len(encoded))
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(settings.seed))[:count].tolist()
    size, collate = settings.per_device_train_batch_size, task.collator(tokenizer)
    first = next(model.parameters())

    def ready(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(first.device, first.dtype if value.is_floating_point() else None)

    batches = [
        {key: ready(value) for key, value in collate([encoded[i] for i in order[start : start + size]]).items()}
        for start in range(0, count, size)
    ]
    needs = ", ".join(sorted(method.needs))
    say(
        f"{type(method).__name__} starts from the {needs} of {count} training rows (of {len(encoded)}, chosen by the seed)"
    )
    return lt.collect(model, batches, None, method.needs, over_processes=False, **place)
