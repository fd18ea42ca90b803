"""`plan`: what a training run will need, from its settings alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratory.plan.job import Inputs, Job, Sharding
from loratory.plan.memory import Plan, plan_job
from loratory.tasks import Task, make_task
from loratory.tasks.task import DEFAULT_LENGTH
from loratory.train.base import DTYPES, embedded_file
from loratory.train.settings import TrainSettings, read_settings

IMAGE_SIZE = 224  # pixels, where neither the model nor its processor says


def plan(
    settings: TrainSettings | Mapping[str, Any], *, devices: int = 1, sharding: Sharding = "none", **keys: Any
) -> Plan:
    """Memory and time of a training run before it runs: from the base's config alone, no weight is loaded.

    settings: as `loratory train` takes them, where `train` may be left out; keys: more of them. devices: processes of one device
    each; sharding: "ddp" (each holds a copy) or "fsdp" (each holds a share).
    Raises ValueError for settings that cannot be, a base whose family is not known (saying what is, and a bound), an optimizer
    whose memory is not known.
    """
    return plan_job(job_of(planned_settings(settings, keys), devices=devices, sharding=sharding))


def planned_settings(settings: TrainSettings | Mapping[str, Any], keys: Mapping[str, Any]) -> TrainSettings:
    """The settings of a run; its data may be left open."""
    flat = settings.flat() if isinstance(settings, TrainSettings) else dict(settings)
    return read_settings({"train": "-", **flat, **keys})


def job_of(settings: TrainSettings, *, devices: int = 1, sharding: Sharding = "none") -> Job:
    """A training run as the plan sees it."""
    task = make_task(settings.task, **settings.task_options)
    config = read_config(settings)
    if settings.task in ("classification", "tagging", "image") and getattr(task, "labels", ()):
        config.num_labels = len(task.labels)  # type: ignore[attr-defined]
    return Job(
        build=builder(settings, config, task),
        pack=packer(settings),
        attach=attacher(settings, task),
        inputs=inputs_of(settings, config, task),
        batch=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        checkpointing=settings.gradient_checkpointing,
        optimizer=str(settings.training_options.get("optim", "adamw_torch_fused")),
        devices=devices,
        sharding=sharding,
    )


# -- the base ----------------------------------------------------------------------------------------------------------


def read_config(settings: TrainSettings) -> Any:
    """The base's transformers config; of a GGUF file, from its header."""
    from transformers import AutoConfig

    where = embedded_file(settings.base)
    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.revision is not None:
        options["revision"] = settings.revision
    if where.endswith(".gguf"):
        path = Path(where).expanduser()
        return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    return AutoConfig.from_pretrained(where, **options)


def builder(settings: TrainSettings, config: Any, task: Task) -> Callable[[], nn.Module]:
    """Makes the base without data."""
    import transformers

    dtype = DTYPES[settings.dtype]
    if not isinstance(dtype, torch.dtype):
        dtype = getattr(config, "dtype", None) or torch.float32

    def build() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = getattr(transformers, task.auto_class).from_config(
                config, dtype=dtype, trust_remote_code=settings.trust_remote_code
            )
        return model

    return build


def packer(settings: TrainSettings) -> Callable[[nn.Module], None] | None:
    """Packs the base as `quantize` does, without data."""
    from loratory.runtime.where import select
    from loratory.sites.packed import pack_linear

    if settings.quantize is None:
        return None

    def pack(model: nn.Module) -> None:
        layers = select(model, "all-linear", exclude=list(settings.also_train) or None)
        for name in list(layers):
            layer = layers.pop(name)
            if not isinstance(layer, nn.Linear):
                raise TypeError(
                    f"layer '{name}' is a {type(layer).__name__}; only torch.nn.Linear can be quantised: leave quantize out"
                )
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, pack_linear(layer, str(settings.quantize)))

    return pack


def attacher(settings: TrainSettings, task: Task) -> Callable[[nn.Module], nn.Module]:
    """Attaches the method as a run does."""
    from loratory.train.run import adapt, silent

    return lambda model: adapt(model, settings, task, 1, silent).model


# -- a batch -----------------------------------------------------------------------------------------------------------


def inputs_of(settings: TrainSettings, config: Any, task: Task) -> Callable[[int], Inputs]:
    """Shapes of a batch whose rows are all as long as the settings allow."""
    shapes = {"image": _pictures, "classification": _texts, "seq2seq": _pairs}.get(settings.task, _tokens)
    return lambda batch: shapes(batch, settings, config, task)


def length_of(task: Task, config: Any) -> int:
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or DEFAULT_LENGTH
    return task.max_length or min(DEFAULT_LENGTH, limit)


def _tokens(batch: int, settings: TrainSettings, config: Any, task: Task) -> Inputs:
    ids = ((batch, length_of(task, config)), torch.long)
    return {"input_ids": ids, "attention_mask": ids, "labels": ids}


def _texts(batch: int, settings: TrainSettings, config: Any, task: Task) -> Inputs:
    return {**_tokens(batch, settings, config, task), "labels": ((batch,), torch.long)}


def _pairs(batch: int, settings: TrainSettings, config: Any, task: Any) -> Inputs:
    labels = ((batch, task.max_target_length), torch.long)
    return {**_tokens(batch, settings, config, task), "labels": labels}


def _pictures(batch: int, settings: TrainSettings, config: Any, task: Task) -> Inputs:
    size = picture_size(embedded_file(settings.base), config)
    dtype = DTYPES[settings.dtype]
    pixels = (batch, getattr(config, "num_channels", 3), *size)
    return {
        "pixel_values": (pixels, dtype if isinstance(dtype, torch.dtype) else torch.float32),
        "labels": ((batch,), torch.long),
    }


def picture_size(where: str, config: Any) -> tuple[int, int]:
    """Height and width that the model's image processor makes, or that the model is made for."""
    import json

    file = Path(where).expanduser() / "preprocessor_config.json"
    found: Any = None
    if file.is_file():
        stated = json.loads(file.read_text(encoding="utf-8"))
        found = stated.get("crop_size") if stated.get("do_center_crop") else stated.get("size")
    if isinstance(found, Mapping):
        found = (found["height"], found["width"]) if "height" in found else found.get("shortest_edge")
    found = found or getattr(config, "image_size", None) or IMAGE_SIZE
    return (found, found) if isinstance(found, int) else (int(found[0]), int(found[1]))
