"""The settings of a training run: one dataclass from which flags, YAML keys, help and recipes are made.

Keys are flat. Beside the fields below a run takes the fields of the chosen method (`rank`, `alpha`, ...), those of the chosen
task (`max_length`, ...), and any other field of transformers' TrainingArguments under its own name.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from types import NoneType
from typing import Any, Literal

from loratory.methods.registry import method_class, method_name
from loratory.runtime.where import ALIASES

TRAIN_ALIASES: dict[str, str] = {  # names of other trainers -> ours; the method's are in runtime/where.py
    "model": "base",
    "base_model": "base",
    "model_name_or_path": "base",
    "data": "train",
    "dataset": "train",
    "train_data": "train",
    "train_file": "train",
    "dev_data": "dev",
    "eval_data": "dev",
    "validation": "dev",
    "validation_file": "dev",
    "test_data": "test",
    "test_file": "test",
    "max_train_samples": "train_rows",
    "max_eval_samples": "dev_rows",
    "max_predict_samples": "test_rows",
    "max_seq_length": "max_length",
    "cutoff_len": "max_length",
    "torch_dtype": "dtype",
    "overwrite_output_dir": "overwrite",
    "resume_from_checkpoint": "resume",
    "warmup_ratio": "warmup_steps",
    "activation_checkpointing": "gradient_checkpointing",
    "finetuning_type": "method",
    "peft_type": "method",
}

GROUPS = {  # first field of each group -> its title in the help and in recipes
    "base": "Model",
    "task": "Data",
    "method": "Method",
    "output_dir": "Run",
    "learning_rate": "Training (transformers' TrainingArguments; any other of its fields works too)",
}

ADAPT_OPTIONS: dict[
    str, tuple[Any, Any, str]
] = {  # keywords of lt.adapt that are no field of a method: type, default, help
    "rank_pattern": (dict[str, int] | None, None, "rank of single layers, by name or regex: {q_proj: 16}"),
    "alpha_pattern": (dict[str, float] | None, None, "alpha of single layers, by name or regex"),
    "blocks": (int | list[int] | None, None, "only the layers of these numbered blocks"),
    "untie": (bool, False, "let also_train part a weight that two modules share"),
    "allow_unused": (bool, False, "layers may get no gradient"),
}

OF_NO_CONSEQUENCE = frozenset(  # settings that may change when a run is resumed: the weights do not depend on them
    [
        "output_dir",
        "overwrite",
        "resume",
        "dry_run",
        "max_minutes",
        "test",
        "test_rows",
        "eval_before",
        "measure_test",
        "logging_steps",
        "report_to",
        "save_total_limit",
        "save_steps",
        "per_device_eval_batch_size",
        "device",
        "train",
        "dev",
        "fsdp",
        "fsdp_config",
        "ddp_timeout",
    ]  # train and dev: their rows are compared instead
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything `loratory train` needs to know. Make one with `read_settings`, which also takes the aliases."""

    base: str  # model to adapt: hub name, folder, .gguf file, or smollm2-135m / minilm-l6
    revision: str | None = None  # branch, tag or commit of a hub model
    trust_remote_code: bool = False  # run Python code that comes with a hub model
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"  # number format of the frozen base
    base_format: Literal["unpacked", "packed"] = "unpacked"  # packed: a .gguf base stays in its 4 or 8 bits
    quantize: Literal["nf4", "int8"] | None = None  # store the frozen base's linear layers in 4 or 8 bits (QLoRA)
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda where there is one
    task: str = "chat"  # chat, text, classification, tagging, seq2seq or image
    train: str  # training rows: file (jsonl, json, csv, parquet, conll, txt, npz), folder, or `datasets` name
    dev: str | None = None  # rows to choose the best checkpoint by; default: the folder's own, or 5 % of train
    test: str | None = None  # rows to measure the end result on
    train_rows: int | None = None  # use only the first so many rows
    dev_rows: int | None = None  # the same for dev
    test_rows: int | None = None  # the same for test
    text_by: Literal["document", "line"] = "document"  # in .txt files: the whole file is one text, or each line is
    method: str = "lora"  # see `loratory methods`; peft:NAME is a tuner of PEFT, with options --peft.OPTION
    where: str | list[str] = "all-linear"  # layers: all-linear, attention, mlp, conv, embedding, names or a regex
    exclude: str | list[str] | None = None  # layers to leave out
    also_train: tuple[str, ...] = ()  # modules trained in full and saved beside; new heads are added by themselves
    bias: Literal["none", "all", "adapted", "lora_only"] = "none"  # which biases are trained too
    per_layer: dict[str, dict[str, Any]] | None = None  # other hyper-parameters by layer name: {q_proj: {rank: 16}}
    output_dir: str = "outputs"  # adapter, checkpoints, metrics and record go here
    overwrite: bool = False  # empty an output_dir that holds an earlier run
    resume: bool = False  # go on from the last checkpoint in output_dir
    dry_run: bool = False  # show data, layers and plan, and stop before the first step
    max_minutes: float | None = None  # save and stop after so many minutes
    eval_before: bool = True  # measure dev and test before training too
    measure_test: bool = True  # false: leave the test rows alone, also those that lie beside the training rows
    early_stopping_patience: int | None = None  # stop after so many evaluations without a better one
    early_stopping_threshold: float = 0.0  # what counts as better
    load_best_model_at_end: bool = True  # end with the best checkpoint on dev, not the last
    metric_for_best_model: str | None = None  # default: the task's own
    greater_is_better: bool | None = None  # default: the task's own
    learning_rate: float = 2e-4  # of the adapter; full fine-tuning wants about a tenth
    num_train_epochs: float = 3.0  # passes over the training rows
    max_steps: int = -1  # overrides num_train_epochs when positive
    per_device_train_batch_size: int = 8  # rows in one forward pass
    per_device_eval_batch_size: int = 8  # rows in one forward pass of an evaluation
    gradient_accumulation_steps: int = 1  # forward passes in one step
    warmup_steps: float = 0.03  # steps of rising rate; below 1: share of all steps
    lr_scheduler_type: str = "linear"  # linear, cosine, constant_with_warmup, ...
    weight_decay: float = 0.0  # of the trained matrices
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0: not
    eval_steps: float | None = None  # steps between evaluations; below 1: share of all; default: each epoch
    save_steps: float | None = None  # steps between checkpoints; default: as eval_steps
    save_total_limit: int | None = 2  # checkpoints kept; the newest and the best always are
    logging_steps: int = 10  # steps between log lines
    seed: int = 42  # of weights, order and dropout
    packing: bool = False  # language models: the rows of a forward pass in one, without padding, kept apart
    memory: Literal["fast", "balanced", "lean"] = "balanced"  # less from left to right; lean recomputes activations
    gradient_checkpointing: bool = False  # less memory, about 20 % slower
    report_to: str | list[str] = "none"  # tensorboard, wandb, ... beside metrics.jsonl
    method_options: dict[str, Any] = field(default_factory=dict)  # fields of the method that were given
    task_options: dict[str, Any] = field(default_factory=dict)  # fields of the task that were given
    training_options: dict[str, Any] = field(default_factory=dict)  # other fields of TrainingArguments

    def __post_init__(self) -> None:
        for name in ("train_rows", "dev_rows", "test_rows", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or left out")
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ValueError(f"max_minutes is {self.max_minutes}; it must be above 0, or left out")
        if self.resume and self.overwrite:
            raise ValueError(
                "resume and overwrite are both given; resume keeps the earlier run, overwrite deletes it: choose one"
            )

    def flat(self) -> dict[str, Any]:
        """All settings under flat keys, as plain JSON values: `read_settings` gives the same settings back."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("_options")}
        every = own | self.method_options | self.task_options | self.training_options
        return {key: list(value) if isinstance(value, tuple) else value for key, value in every.items()}


OWN = tuple(f.name for f in fields(TrainSettings) if not f.name.endswith("_options"))


def read_settings(given: Mapping[str, Any]) -> TrainSettings:
    """Settings from flat keys; aliases, `-` for `_`, and text for numbers are understood.

    Raises ValueError for an unknown key (with the nearest names), a key given under two names, and a value of the wrong kind.
    """
    flat = canonical(given)
    if plain(flat.pop("use_dora", False)) is True:
        flat.setdefault("method", "dora")
    if not isinstance(flat.get("method", ""), str):  # a Method object, from Python
        flat |= {k: v for k, v in flat["method"].hyperparameters().items() if k not in flat}
        flat["method"] = method_name(flat["method"])
    method, task = chosen(flat)
    of_task = option_names(task)
    of_method = set(method.kinds()) if is_bridge(flat.get("method")) else option_names(method) | set(ADAPT_OPTIONS)
    of_peft = {
        key: method.read(key, flat.pop(key)) for key in list(flat) if key.startswith("peft.") and key in of_method
    }
    extra = {key: flat.pop(key) for key in list(flat) if key not in (*OWN, *of_method, *of_task)}
    for key in extra:
        check_training_field(key, known=(*OWN, *of_method, *of_task))
    typed = convert(flat, types_of(method, task))
    for name in ("base", "train"):
        if not typed.get(name):
            raise ValueError(
                f"{name} is missing: {field_docs(TrainSettings)[name]}; give --{name}, or `{name}:` in the YAML file"
            )
    if typed.get("memory") == "lean":
        if typed.get("gradient_checkpointing") is False:
            raise ValueError(
                "memory lean recomputes activations, and gradient_checkpointing is false; leave one of them out"
            )
        typed["gradient_checkpointing"] = True
    return TrainSettings(
        **{key: typed[key] for key in typed if key in OWN},
        method_options={key: value for key, value in typed.items() if key in of_method} | of_peft,
        task_options={key: value for key, value in typed.items() if key in of_task},
        training_options={key: plain(value) for key, value in extra.items()},
    )


def canonical(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys under our names. Raises ValueError where one setting comes under two names."""
    out: dict[str, Any] = {}
    origin: dict[str, str] = {}
    nested = given.get("peft")
    if isinstance(nested, Mapping):  # peft: {r: 8}, as in a recipe
        given = {k: v for k, v in given.items() if k != "peft"} | {f"peft.{k}": v for k, v in nested.items()}
    for key, value in given.items():
        spelled = str(key).replace("-", "_")
        name = ALIASES.get(spelled) or TRAIN_ALIASES.get(spelled, spelled)
        if name in out:
            raise ValueError(f"'{origin[name]}' and '{key}' are the same setting ({name}); give it once")
        out[name], origin[name] = value, str(key)
    return out


def is_bridge(method: Any) -> bool:
    """Whether this names a tuner of PEFT."""
    return isinstance(method, str) and method.startswith("peft:")


def chosen(flat: Mapping[str, Any]) -> tuple[Any, type]:
    """Classes of the chosen method and task. Raises ValueError with the nearest names if there is none such."""
    from loratory.tasks import TASKS

    task = str(flat.get("task", "chat"))
    if task not in TASKS:
        near = get_close_matches(task, TASKS, n=3, cutoff=0.0)
        raise ValueError(f"there is no task '{task}'; nearest names: {', '.join(near)}; all: {', '.join(TASKS)}")
    method = flat.get("method", "lora")
    if is_bridge(method):
        from loratory.train.peft_bridge import tuner

        return tuner(method), TASKS[task]
    return method_class(str(method)), TASKS[task]


def option_names(cls: type) -> set[str]:
    return {f.name for f in fields(cls)}


def check_training_field(key: str, known: tuple[str, ...]) -> None:
    from transformers import TrainingArguments

    allowed = {f.name for f in fields(TrainingArguments)}
    if key == "deepspeed":
        raise ValueError(
            "deepspeed is a setting that `loratory train` does not take: its checkpoints resume to the same bits, and DeepSpeed's would not; "
            "shard with fsdp: true, or call deepspeed.initialize in a loop of your own (docs/guides/several_machines.md)"
        )
    if key in ("load_in_4bit", "load_in_8bit"):
        packing = "nf4" if key == "load_in_4bit" else "int8"
        raise ValueError(f"'{key}' is called quantize here: give quantize: {packing}, or leave it out")
    if key not in allowed:
        near = get_close_matches(key, {*known, *allowed, *ALIASES, *TRAIN_ALIASES}, n=3, cutoff=0.0)
        raise ValueError(
            f"there is no setting '{key}'; nearest names: {', '.join(near)}; `loratory train --help` lists them "
            "(method and task bring their own, so check those two as well)"
        )


def convert(flat: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The values as these types, by jsonargparse. Raises ValueError naming the setting, its value and what it must be."""
    import jsonargparse

    ready = {key: listed(value, hints[key]) for key, value in flat.items()}
    passed = {key: ready.pop(key) for key in list(ready) if callable(ready[key])}  # a predicate, from Python
    out: dict[str, Any] = {}
    for key, value in ready.items():
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{key}", type=hints[key])
        try:
            out[key] = parser.parse_object({key: value})[key]
        except Exception as e:  # jsonargparse wraps what its type checks raise
            raise ValueError(f"{key} is {value!r}; it must be {type_words(hints[key])}") from e
    return out | passed


def types_of(method: Any, task: type) -> dict[str, Any]:
    """Every key that jsonargparse reads, with its type."""
    hints = {name: kind for name, (kind, _, _) in ADAPT_OPTIONS.items()}
    if hasattr(method, "kinds"):  # a tuner of PEFT
        hints, method = method.kinds(), TrainSettings
    for cls in (method, task, TrainSettings):
        found = typing.get_type_hints(cls)
        hints |= {f.name: found[f.name] for f in fields(cls)}
    return hints


def listed(value: Any, kind: Any) -> Any:
    """A list for a setting that holds only lists, where `a,b` was given."""
    text = str in typing.get_args(kind) and typing.get_origin(kind) not in (list, tuple)
    if isinstance(value, str) and is_list(kind) and not text and not value.lstrip().startswith("["):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, tuple | set) else value


def is_list(kind: Any) -> bool:
    """Whether a type holds several values, alone or in a union."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) not in (list, tuple, dict, Literal) else (kind,)
    return any(typing.get_origin(k) in (list, tuple) for k in kinds)


def plain(value: Any) -> Any:
    """What a flag's text means, by YAML's rules: 3 is a number, true a truth value."""
    import yaml

    if not isinstance(value, str) or not value.strip():
        return value
    if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value.strip()):
        return float(value)  # YAML takes 1e-5, which has no point, for text
    return yaml.safe_load(value)


def type_words(kind: Any) -> str:
    """A type in words: 'a whole number or none'."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (list, tuple):
        return "a list of " + {str: "names", int: "whole numbers"}.get(typing.get_args(kind)[0], "values")
    if typing.get_origin(kind) is dict:
        return "a table {name: value}"
    words = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        NoneType: "none (null)",
        dict: "a table",
    }
    if kind in words:
        return words[kind]
    return " or ".join(type_words(k) for k in typing.get_args(kind)) or str(kind)


def field_docs(cls: type) -> dict[str, str]:
    """What each field is: the comment behind it, also where the default stands on a line of its own."""
    docs: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if parent is object or not hasattr(parent, "__dataclass_fields__"):
            continue
        for name, doc in re.findall(
            r"^    (\w+): [^\n#]*?(?:\(\n[^\n#]*)?(?:#\s*([^\n]*))?$", inspect.getsource(parent), re.M
        ):
            docs[name] = doc or docs.get(name, "")
    return {f.name: docs.get(f.name, "") for f in fields(cls)}


def default_of(f: Any) -> Any:
    """A field's default; None where it must be given."""
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else None
