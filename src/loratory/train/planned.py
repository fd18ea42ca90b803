"""`plan`: what a training run will need, from its settings alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loratory.plan.cards import shown
from loratory.plan.clock import Rates, machine, measure
from loratory.plan.job import Inputs, Job, Sharding
from loratory.plan.memory import Plan, plan_job
from loratory.runtime.shards import processes
from loratory.store.atomic import to_json, write_files
from loratory.tasks import Task, make_task
from loratory.tasks.task import DEFAULT_LENGTH
from loratory.train.base import DTYPES, cache_folder, embedded_file, find_base, is_unpacked
from loratory.train.settings import TrainSettings, read_settings

IMAGE_SIZE = 224  # pixels, where neither the model nor its processor says
logger = logging.getLogger("loratory")
NO_DATA = "-"  # stands for the training rows that a plan does not need
CALIBRATION = "calibration.json"  # in the cache folder: rates by machine
SIZES = {  # what a config may call the sizes of a model
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "blocks": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "inner width": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "moe_intermediate_size"),
    "vocabulary": ("vocab_size",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
}


def plan(
    settings: TrainSettings | Mapping[str, Any],
    *,
    devices: int = 1,
    sharding: Sharding = "none",
    calibrate: bool = False,
    **keys: Any,
) -> Plan:
    """Memory and time of a training run before it runs: from the base's config alone, no weight is loaded.

    settings: as `loratory train` takes them, where `train` may be left out; keys: more of them. Every row of a batch counts as
    max_length tokens long. devices: processes of one device each; sharding: "ddp" (each holds a copy) or "fsdp" (each holds a
    share). calibrate: time this machine (two seconds, remembered); a machine that was timed before gives step_seconds anyway.
    Raises ValueError for settings that cannot be, a base whose family is not known (saying what is, and a bound), an optimizer
    whose memory is not known.
    """
    read = planned_settings(settings, keys)
    return plan_job(job_of(read, devices=devices, sharding=sharding), rates_of(read.device, calibrate=calibrate))


def planned_settings(settings: TrainSettings | Mapping[str, Any], keys: Mapping[str, Any]) -> TrainSettings:
    """The settings of a run; its data may be left open."""
    flat = settings.flat() if isinstance(settings, TrainSettings) else dict(settings)
    return read_settings({"train": NO_DATA, **flat, **keys})


def job_of(settings: TrainSettings, *, devices: int = 1, sharding: Sharding = "none", config: Any = None) -> Job:
    """A training run as the plan sees it. config: the base's, where it was read before."""
    task = make_task(settings.task, **settings.task_options)
    config = config or read_config(settings)
    labels = getattr(task, "labels", ())
    if labels:
        config.num_labels = len(labels)
    file = gguf_file(settings)
    unpacks = file is not None and settings.base_format == "unpacked" and not is_unpacked(file)
    depth = equal_blocks(settings, config)

    def cut(blocks: int) -> Job:
        shallow = deepcopy(config)
        text = shallow.get_text_config()
        text.num_hidden_layers = blocks
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:blocks]
        return job_of(settings, devices=devices, sharding=sharding, config=shallow)

    return Job(
        build=builder(settings, config, task),
        pack=packer(settings),
        attach=attacher(settings, task),
        inputs=inputs_of(settings, config, task),
        stored=stored_format(settings, config),
        file=file.stat().st_size if file is not None and (unpacks or settings.base_format == "packed") else 0,
        unpacks=unpacks,
        batch=settings.per_device_train_batch_size,
        accumulation=settings.gradient_accumulation_steps,
        checkpointing=settings.gradient_checkpointing,
        optimizer=str(settings.training_options.get("optim", "adamw_torch_fused")),
        on_gpu=settings.device != "cpu",
        devices=devices,
        sharding=sharding,
        depth=depth,
        cut=cut if depth is not None else None,
        settings={key: value for key, value in settings.flat().items() if (key, value) != ("train", NO_DATA)},
    )


def equal_blocks(settings: TrainSettings, config: Any) -> int | None:
    """The number of blocks, where all are alike to the model and to the settings; else None."""
    text = config.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)
    kinds = set(getattr(text, "layer_types", None) or ())
    chosen = {key for key in ("blocks", "rank_pattern", "alpha_pattern") if settings.method_options.get(key)}
    if not isinstance(depth, int) or len(kinds) > 1 or chosen or settings.per_layer or settings.base_format == "packed":
        return None
    return depth


# -- the base ----------------------------------------------------------------------------------------------------------


def read_config(settings: TrainSettings) -> Any:
    """The base's transformers config; of a GGUF file, from its header. Raises ValueError for a family that is not known."""
    from transformers import AutoConfig

    options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    if settings.revision is not None:
        options["revision"] = settings.revision
    file = gguf_file(settings)
    if file is not None:
        return AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    where = find_base(settings.base)
    try:
        return AutoConfig.from_pretrained(where, **options)
    except ValueError as error:
        raise ValueError(unknown_family(settings, where)) from error
    except OSError as error:
        raise FileNotFoundError(
            f"base '{settings.base}' has no config to plan from; {str(error).splitlines()[0]}"
        ) from error


def gguf_file(settings: TrainSettings) -> Path | None:
    """The base's GGUF file, where it is one."""
    path = Path(embedded_file(settings.base)).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise FileNotFoundError(f"base '{settings.base}' was not found; a GGUF file of that name does not exist")
    return path


def stored_format(settings: TrainSettings, config: Any) -> torch.dtype | None:
    """The number format of the weights' files: as a local folder's first file says, or the config. None: not known."""
    from loratory.plan.file import NAMES

    if gguf_file(settings) is not None:
        return torch.float32 if settings.base_format == "unpacked" else None
    folder = Path(embedded_file(settings.base)).expanduser()
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        names = {entry["dtype"] for key, entry in header.items() if key != "__metadata__"}
        found = [dtype for dtype, name in NAMES.items() if name in names and dtype.is_floating_point]
        if found:
            return max(found, key=lambda dtype: dtype.itemsize)
    stated = getattr(config, "dtype", None)
    return stated if isinstance(stated, torch.dtype) else None


def unknown_family(settings: TrainSettings, where: str) -> str:
    """What is known of a base whose family transformers does not know, and a bound for it."""
    from transformers import PretrainedConfig, __version__

    stated, _ = PretrainedConfig.get_config_dict(where)
    found = {
        name: next((stated[key] for key in keys if isinstance(stated.get(key), int)), None)
        for name, keys in SIZES.items()
    }
    family = stated.get("model_type") or "not stated"
    known = ", ".join(f"{name} {value:,}" for name, value in found.items() if value is not None) or "no sizes"
    text = f"base '{settings.base}' is of a family ({family}) that transformers {__version__} does not know; its config states {known}"
    width, blocks = found["width"], found["blocks"]
    if width is not None and blocks is not None:
        inner, vocabulary = found["inner width"] or 4 * width, found["vocabulary"] or 0
        count = 2 * vocabulary * width + blocks * (
            4 * width**2 + 3 * inner * width * (found["experts"] or 1) + 4 * width
        )
        size = count * getattr(DTYPES[settings.dtype], "itemsize", 4)
        tokens = settings.per_device_train_batch_size * (settings.task_options.get("max_length") or DEFAULT_LENGTH)
        kept = 4 * tokens * (blocks * (12 * width + 4 * inner) + 3 * vocabulary)
        text += (
            f": at most {count / 1e9:.3g} billion numbers, so at most {shown(size)} of weights and {shown(kept)} of activations"
            " with an adapter"
        )
    return text + "; update transformers, or set trust_remote_code where the model brings its own code"


def builder(settings: TrainSettings, config: Any, task: Task) -> Callable[[], nn.Module]:
    """Makes the base without data."""
    import transformers

    dtype = DTYPES[settings.dtype]
    if not isinstance(dtype, torch.dtype):
        dtype = getattr(config, "dtype", None) or torch.float32

    def packed() -> nn.Module:
        from loratory.store.gguf_base import load_gguf

        file = gguf_file(settings)
        if file is None:
            raise ValueError(
                f"base '{settings.base}' is no .gguf file, so base_format packed means nothing for it; leave it out, or see quantize"
            )
        return load_gguf(file, dtype=dtype, device="meta")

    def plain() -> nn.Module:
        with torch.device("meta"):
            return getattr(transformers, task.auto_class).from_config(
                config, dtype=dtype, trust_remote_code=settings.trust_remote_code
            )

    return packed if settings.base_format == "packed" else plain


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


# -- this machine's speed ----------------------------------------------------------------------------------------------


def rates_of(device: str, *, calibrate: bool = False) -> Rates | None:
    """What this machine was measured to do, or is measured to do now; None where it was not."""
    kind = "cuda" if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()) else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        return None
    file = cache_folder() / CALIBRATION
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = known.get(machine(kind))
    if found is not None:
        return Rates(**found)
    if not calibrate:
        return None
    rates = measure(kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_files(file.parent, {CALIBRATION: to_json(known | {rates.machine: rates.to_json()})})
    return rates


# -- a batch -----------------------------------------------------------------------------------------------------------


def inputs_of(settings: TrainSettings, config: Any, task: Task) -> Callable[[int], Inputs]:
    """Shapes of a batch whose rows are all as long as the settings allow."""
    shapes = {"image": _pictures, "classification": _texts, "seq2seq": _pairs}.get(settings.task, _tokens)
    return lambda batch: shapes(batch, settings, config, task)


def length_of(task: Task, config: Any) -> int:
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or DEFAULT_LENGTH
    return task.max_length or min(DEFAULT_LENGTH, limit)


def _tokens(batch: int, settings: TrainSettings, config: Any, task: Task) -> Inputs:
    length = length_of(task, config)
    if settings.packing:
        row = ((1, batch * length), torch.long)
        return {"input_ids": row, "labels": row}
    ids = ((batch, length), torch.long)
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
    file = Path(where).expanduser() / "preprocessor_config.json"
    found: Any = None
    if file.is_file():
        stated = json.loads(file.read_text(encoding="utf-8"))
        found = stated.get("crop_size") if stated.get("do_center_crop") else stated.get("size")
    if isinstance(found, Mapping):
        found = (found["height"], found["width"]) if "height" in found else found.get("shortest_edge")
    found = found or getattr(config, "image_size", None) or IMAGE_SIZE
    return (found, found) if isinstance(found, int) else (int(found[0]), int(found[1]))


# -- a run that is about to start --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foreseen:
    """What a training step will hold, in bytes."""

    peak: int
    resting: int  # of it, what is there before the step


def foresee(run: Any) -> Foreseen | None:
    """The plan of a prepared run, with rows as long as its longest; None for a model that cannot be planned, which is no reason to
    stop the run.
    """
    settings, task, model = run.settings, run.task, run.model
    options = dict(settings.task_options)
    rows = run.encoded["train"]
    if settings.task != "image":
        options["max_length"] = max(rows.size(i) for i in range(len(rows)))
    if settings.task == "seq2seq":
        options["max_target_length"] = max(len(rows[i]["labels"]) for i in range(len(rows)))
    if getattr(task, "labels", ()):
        options["labels"] = task.labels
    count = processes()
    sharding: Sharding = "none" if count == 1 else "fsdp" if settings.training_options.get("fsdp") else "ddp"
    try:
        job = job_of(replace(settings, task_options=options), devices=count, sharding=sharding, config=model.config)
        found = plan_job(job)
    except Exception as error:  # whatever a model's own code raises without data
        logger.warning("the memory of a step could not be planned: %s", " ".join(str(error).split()))
        return None
    return Foreseen(found.peak, sum(found.parts[part] for part in ("weights", "adapters")))
