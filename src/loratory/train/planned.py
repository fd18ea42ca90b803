"""`plan`: what a training run will need, from its settings alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from loratory.plan.job import Inputs, Job, Sharding
from loratory.plan.memory import Plan, plan_job
from loratory.tasks import Task, make_task
from loratory.tasks.task import DEFAULT_LENGTH
from loratory.train.base import DTYPES, embedded_file
from loratory.train.settings import TrainSettings, read_settings


def plan(
    settings: TrainSettings | Mapping[str, Any], *, devices: int = 1, sharding: Sharding = "none", **keys: Any
) -> Plan:
    """Memory and time of a training run, before it runs: no weight is loaded.

    settings: as `loratory train` takes them; `train` may be left out.
    """
    return plan_job(job_of(planned_settings(settings, keys), devices=devices, sharding=sharding))


def planned_settings(settings: TrainSettings | Mapping[str, Any], keys: Mapping[str, Any]) -> TrainSettings:
    """The settings of a run; its data may be left open."""
    flat = settings.flat() if isinstance(settings, TrainSettings) else dict(settings)
    return read_settings({"train": "-", **flat, **keys})


def job_of(settings: TrainSettings, *, devices: int = 1, sharding: Sharding = "none") -> Job:
    """A training run as what `planning` understands."""
    task = make_task(settings.task, **settings.task_options)
    config = read_config(settings)
    return Job(
        build=builder(settings, config, task),
        attach=attacher(settings, task),
        inputs=inputs_of(settings, config, task),
        batch=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        checkpointing=settings.gradient_checkpointing,
        optimizer=str(settings.training_options.get("optim", "adamw_torch_fused")),
        devices=devices,
        sharding=sharding,
    )


def read_config(settings: TrainSettings) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(embedded_file(settings.base))


def builder(settings: TrainSettings, config: Any, task: Task) -> Callable[[], nn.Module]:
    """Makes the base without data."""
    import transformers

    dtype = DTYPES[settings.dtype]

    def build() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, task.auto_class).from_config(config, dtype=dtype)
        return model

    return build


def attacher(settings: TrainSettings, task: Task) -> Callable[[nn.Module], None]:
    """Attaches the method as a run does."""
    from loratory.train.run import adapt, silent

    def attach(model: nn.Module) -> None:
        adapt(model, settings, task, 1, silent)

    return attach


def inputs_of(settings: TrainSettings, config: Any, task: Task) -> Callable[[int], Inputs]:
    """Shapes of a batch."""
    length = task.max_length or min(DEFAULT_LENGTH, getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH)

    def inputs(batch: int) -> Inputs:
        tokens = ((batch, length), torch.long)
        return {"input_ids": tokens, "attention_mask": tokens, "labels": tokens}

    return inputs
