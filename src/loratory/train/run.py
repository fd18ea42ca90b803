"""One training run, from settings to a finished adapter."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import loratory as lt
from loratory.tasks import Encoded, Task, make_task
from loratory.tasks.data import Data, read_data
from loratory.train import checkpoint as ckpt
from loratory.train.callbacks import EarlyStopping, Interrupt, Metrics, Progress, TimeLimit, measured
from loratory.train.folder import begin_folder, check_folder, command_to_resume, refuse_changes, write_json
from loratory.train.prints import data_print, significant, versions
from loratory.train.settings import TrainSettings, read_settings

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    output_dir: str
    adapter: str | None  # its folder; None for a dry run, and where nothing is trained or the run was interrupted
    before: dict[str, float] = field(default_factory=dict)  # on dev
    after: dict[str, float] = field(default_factory=dict)
    test_before: dict[str, float] = field(default_factory=dict)
    test_after: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    trained: int = 0  # numbers
    total: int = 0  # numbers of the base
    steps: int = 0
    best_step: int | None = None
    stopped: str = "done"  # done, early stopping, time, interrupted, dry run
    seconds: float = 0.0
    peak_memory: int = 0  # bytes

    def __str__(self) -> str:
        names = [key for key in {**self.before, **self.after} if isinstance({**self.before, **self.after}[key], float)]
        lines = [f"{'':24}{'before':>12}{'after':>12}"] if names or self.test_after else []
        for title, before, after in (("dev", self.before, self.after), ("test", self.test_before, self.test_after)):
            for key in after or before:
                cells = [f"{values[key]:.4f}" if key in values else "" for values in (before, after)]
                lines.append(f"{title + ' ' + key:24}{cells[0]:>12}{cells[1]:>12}")
        lines.append(
            f"{self.steps} steps in {self.seconds:.0f} s ({self.stopped}), {self.trained:,} of {self.total:,} numbers trained, "
            f"peak memory {self.peak_memory / 2**20:,.0f} MiB"
        )
        if self.adapter:
            lines.append(f"adapter: {self.adapter}")
        return "\n".join(lines)


def train(settings: TrainSettings | None = None, *, say: Say = print, **keys: Any) -> Result:
    """Train an adapter. Settings come as one object, or as keys (`train(base=..., train=..., rank=8)`).

    Raises ValueError, FileNotFoundError, FileExistsError for mistakes in them, FloatingPointError when the loss becomes nan,
    OSError when the disk is full, MemoryError when memory runs out.
    """
    if (settings is None) == (not keys):
        raise TypeError("train takes either one TrainSettings object or settings as keywords, not both and not neither")
    settings = settings or read_settings(keys)
    started = time.monotonic()
    output = check_folder(settings)
    try:
        return _train(settings, output, started, say)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if out_of_memory(e):
            raise MemoryError(memory_advice(settings)) from e
        raise


def _train(settings: TrainSettings, output: Path, started: float, say: Say) -> Result:
    from transformers import set_seed

    from loratory.train.arguments import training_arguments
    from loratory.train.trainer import LoraTrainer, kept_generators, restore_adapter

    device = pick_device(settings.device)
    task, data = load_data(settings, say)
    set_seed(settings.seed)
    model, tokenizer, task = load_model(settings, task, data, device)
    encoded = {"train": task.encode(data.train, tokenizer), "dev": task.encode(data.dev, tokenizer)}
    show_data(task, encoded, tokenizer, say)
    adapt(model, settings, task, say)
    parameters = lt.trained(model)
    summary = lt.summary(model)
    say(str(summary))
    common: dict[str, Any] = {"output_dir": str(output), "trained": summary.trained, "total": summary.total}
    record = {"settings": significant(settings), "data": {name: data_print(each) for name, each in encoded.items()}, "versions": versions()}
    arguments = training_arguments(settings, device, task.best_metric)
    plan = f"{-(-len(encoded['train']) // settings.per_device_train_batch_size)} batches an epoch on {device}, {settings.dtype}"
    if settings.dry_run:
        say(f"dry run: {plan}; nothing was trained and nothing written")
        return Result(adapter=None, stopped="dry run", seconds=time.monotonic() - started, **common)
    say(plan)
    begin_folder(settings, output, say)
    resume_from = ckpt.last_checkpoint(output) if settings.resume else None
    if resume_from is not None:
        refuse_changes(ckpt.read_state(resume_from)[0]["run"], record, resume_from, say)
        say(f"resuming from {resume_from}")
    elif settings.resume:
        say(f"there is no checkpoint in {output} yet, so the run starts from step 0")

    callbacks: dict[str, Any] = {}
    if settings.max_minutes is not None:
        callbacks["time"] = TimeLimit(settings.max_minutes)
    interrupt = callbacks["interrupted"] = Interrupt(say)

    def why_stopped() -> str | None:
        return next((name for name in ("early stopping", "interrupted", "time") if name in callbacks and callbacks[name].stopped), None)

    trainer = LoraTrainer(
        model,
        arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded["dev"],
        data_collator=task.collator(tokenizer),
        compute_metrics=task.metrics(),
        preprocess_logits_for_metrics=task.reduce_logits,
        record=record,
        limit=settings.save_total_limit,
        why_stopped=why_stopped,
    )

    def measure_test() -> dict[str, float]:
        if not data.test:
            return {}
        with kept_generators():
            return numbers(task.evaluate(model, tokenizer, data.test, settings.per_device_eval_batch_size))

    before = earlier_measure(output) if resume_from is not None else {}
    if settings.eval_before and not before:
        before = {"dev": numbers(trainer.evaluate()), "test": measure_test()}
        write_json(output / "before.json", before)
        say(f"before training: dev {words(before['dev'])}" + (f"; test {words(before['test'])}" if before["test"] else ""))
    measured_before = {"before": before.get("dev", {}), "test_before": before.get("test", {})}
    if not parameters:
        after = {"after": numbers(trainer.evaluate()), "test_after": measure_test()}
        say("the method trains nothing, so this run only measures")
        result = Result(adapter=None, seconds=time.monotonic() - started, peak_memory=peak_memory(), **common, **measured_before, **after)
        write_json(output / "result.json", dataclasses.asdict(result))
        return result

    if settings.early_stopping_patience is not None:
        metric, greater = arguments.metric_for_best_model, arguments.greater_is_better
        callbacks["early stopping"] = EarlyStopping(metric, greater, settings.early_stopping_patience, settings.early_stopping_threshold)
    progress = Progress(say, lambda: trainer.tokens_seen)
    for callback in (*callbacks.values(), Metrics(output / "metrics.jsonl", before.get("dev")), progress):
        trainer.add_callback(callback)
    finished = ckpt.read_state(resume_from)[0]["stopped"] if resume_from is not None else None
    if resume_from is not None and finished in ("done", "early stopping"):
        trainer.take_up(resume_from)
        stopped = finished
    else:
        try:
            with interrupt:
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from is not None else None)
        finally:
            progress.close()
        stopped = why_stopped() or "done"
    state = trainer.state
    common |= {"history": state.log_history, "steps": state.global_step, "best_step": state.best_global_step, "stopped": stopped}
    if stopped in ("interrupted", "time"):
        say(f"stopped at step {state.global_step} of {state.max_steps} ({stopped}); go on with: {command_to_resume(settings)}")
    if stopped == "interrupted":
        return Result(adapter=None, seconds=time.monotonic() - started, peak_memory=peak_memory(), **common, **measured_before)

    best = trainer.best_checkpoint()
    restored = settings.load_best_model_at_end and best is not None and best.is_dir() and state.best_global_step != state.global_step
    if restored and best is not None:
        restore_adapter(model, best)
        say(f"taking the best checkpoint: step {state.best_global_step}, {arguments.metric_for_best_model} {state.best_metric:.4f}")
    taken = state.best_global_step if restored else state.global_step
    logged = next((line for line in reversed(state.log_history) if line["step"] == taken and any(key.startswith("eval_") for key in line)), None)
    dev = {k: v for k, v in logged.items() if k.startswith("eval_")} if logged else trainer.evaluate()
    after = {"after": numbers(dev), "test_after": measure_test()}
    adapter = output / "adapter"
    result = Result(
        adapter=str(adapter), seconds=time.monotonic() - started, peak_memory=peak_memory(), **common, **measured_before, **after
    )
    training = record | {"base": where_base_is(settings.base), "task": task.settings(), "settings": settings.flat()}
    training["result"] = {k: v for k, v in dataclasses.asdict(result).items() if k != "history"}
    trainer.save_final(adapter, training)
    write_json(output / "result.json", dataclasses.asdict(result))
    return result


# -- the pieces --------------------------------------------------------------------------------------------------------


def pick_device(asked: str) -> str:
    """cpu, cuda or mps. Raises ValueError or RuntimeError for a device that cannot be used."""
    from loratory.train.base import check_device

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    device = check_device(asked)
    if device.index:
        raise ValueError(f"device is {asked}, but a run takes the first GPU it sees; set CUDA_VISIBLE_DEVICES={device.index} and device: cuda")
    return device.type


def load_data(settings: TrainSettings, say: Say) -> tuple[Task, Data]:
    """Rows of all splits, and the task with its columns and labels found."""
    data = read_data(settings.train, dev=settings.dev, test=settings.test, text_by=settings.text_by, seed=settings.seed)
    data = dataclasses.replace(
        data, train=data.train[: settings.train_rows], dev=data.dev[: settings.dev_rows], test=data.test[: settings.test_rows]
    )
    task = make_task(settings.task, **settings.task_options).resolve(data.train)
    for note in (*data.notes, *task.notes()):
        say(note)
    return task, data


def load_model(settings: TrainSettings, task: Task, data: Data, device: str) -> tuple[Any, Any, Task]:
    from loratory.train.base import load_base

    options = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    model, tokenizer = load_base(
        settings.base, task.auto_class, dtype=settings.dtype, device=device, base_format=settings.base_format, **options, **task.model_kwargs()
    )
    if settings.quantize is not None:
        lt.quantize(model, settings.quantize, exclude=list(settings.also_train) or None)
    return model, tokenizer, task


def adapt(model: Any, settings: TrainSettings, task: Task, say: Say) -> None:
    """Attach the method; heads that may start random are trained too, and said."""
    from loratory.methods.registry import method_class

    options, also = dict(settings.method_options), list(settings.also_train)
    if method_class(settings.method).trains == "factors":
        options |= {"where": settings.where, "exclude": settings.exclude}
        if heads := [name for name in task.head_modules(model) if name not in also]:
            say(f"the head {', '.join(heads)} is new and starts at random, so it is trained in full and saved with the adapter")
            also += heads
    lt.adapt(model, settings.method, also_train=also, bias=settings.bias, per_layer=settings.per_layer, **options)


def show_data(task: Task, encoded: Mapping[str, Encoded], tokenizer: Any, say: Say) -> None:
    for name, each in encoded.items():
        say(f"{name}: {task.counts(each)}")
    for note in dict.fromkeys(note for each in encoded.values() for note in each.notes):
        say(note)
    say("the first training example:")
    say(str(task.preview(encoded["train"], tokenizer)))


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The quality figures of an evaluation, without prefix and speeds."""
    speeds = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")
    return {
        key.removeprefix("eval_"): float(value)
        for key, value in metrics.items()
        if not key.endswith(speeds) and isinstance(value, int | float) and math.isfinite(value)  # JSON has no nan
    }


def words(metrics: Mapping[str, float]) -> str:
    return measured({f"eval_{key}": value for key, value in metrics.items()})


def earlier_measure(output: Path) -> dict[str, dict[str, float]]:
    file = output / "before.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def where_base_is(base: str) -> str:
    """A base that is a file or folder by its full path, so that the adapter finds it from anywhere."""
    return str(Path(base).resolve()) if os.path.exists(base) else base


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_advice(settings: TrainSettings) -> str:
    batch, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    half = max(1, batch // 2)
    smaller = f"per_device_train_batch_size {half} with gradient_accumulation_steps {steps * batch // half} (now {batch} and {steps}), " if batch > 1 else ""
    more = "" if settings.gradient_checkpointing else "gradient_checkpointing true, "
    kind = "" if settings.dtype == "bfloat16" else "dtype bfloat16, "
    return f"memory ran out; try, in this order: {smaller}{more}{kind}a smaller max_length, a smaller base"
