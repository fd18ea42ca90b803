"""transformers' TrainingArguments from our settings."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

from loratory.train.settings import TrainSettings

PASSED = [  # fields that both have under one name
    "output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "warmup_steps", "lr_scheduler_type", "weight_decay", "max_grad_norm", "logging_steps", "seed",
    "report_to",
]  # fmt: skip

TAKEN = {  # fields of TrainingArguments that loratory needs for itself -> what to use instead
    "auto_find_batch_size": "set per_device_train_batch_size",
    "disable_tqdm": "pipe the output for plain lines",
    "do_eval": "leave dev out of the data",
    "do_predict": "give test data",
    "do_train": "use `loratory eval` to measure without training",
    "ignore_data_skip": "a resumed run always sees the rows an uninterrupted one would see",
    "local_rank": "start with torchrun",
    "logging_nan_inf_filter": "nan and inf always stop a run",
    "no_cuda": "set device: cpu",
    "remove_unused_columns": "the task decides what the model gets",
    "save_only_model": "checkpoints always hold what a resume needs",
    "use_cpu": "set device: cpu",
}


def training_arguments(settings: TrainSettings, device: str, best_metric: tuple[str, bool]) -> Any:
    """TrainingArguments for these settings. Raises ValueError for a field that loratory sets itself, or that is refused."""
    from transformers import TrainingArguments

    for key in settings.training_options:
        if key in TAKEN:
            raise ValueError(f"'{key}' cannot be set, loratory needs it for itself; instead, {TAKEN[key]}")
    metric, greater = settings.metric_for_best_model or best_metric[0], settings.greater_is_better
    if greater is None:
        greater = best_metric[1] if metric == best_metric[0] else not metric.endswith(("loss", "perplexity"))
    known = {f.name for f in fields(TrainingArguments)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    evaluate = {"eval_strategy": "epoch"} if settings.eval_steps is None else steps("eval", settings.eval_steps)
    save: dict[str, Any] = steps("save", settings.save_steps) if settings.save_steps is not None else {}
    if not save:
        save = {"save_strategy": "epoch"} if settings.eval_steps is None else steps("save", settings.eval_steps)
    values = {name: getattr(settings, name) for name in PASSED}
    values |= {checkpointing: settings.gradient_checkpointing, **evaluate, **save}
    values |= {"metric_for_best_model": metric, "greater_is_better": greater, "label_names": ["labels"]}
    values |= {
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
    }
    values |= {"ddp_find_unused_parameters": bool(settings.method_options.get("allow_unused", False))}
    values |= deepcopy(settings.training_options)  # TrainingArguments fills in fsdp_config
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError) as e:
        raise ValueError(f"the training settings are refused: {' '.join(str(e).split())}") from e
    if device != "cpu" and arguments.parallel_mode.value == "not_distributed":
        arguments._n_gpu = 1  # several visible GPUs would mean DataParallel, which copies the model at each step
    return arguments


def steps(kind: str, number: float) -> dict[str, Any]:
    return {f"{kind}_strategy": "steps", f"{kind}_steps": int(number) if number >= 1 else number}
