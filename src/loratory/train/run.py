"""One training run, from settings to a finished adapter."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import loratory as lt
from loratory.methods.registry import method_class
from loratory.runtime.shards import is_main_process, processes, wait
from loratory.tasks import Encoded, Task, make_task
from loratory.tasks.data import Data, read_data
from loratory.tasks.packing import PackBatch, check_packing
from loratory.train import checkpoint as ckpt
from loratory.train.attached import Attached, Own
from loratory.train.folder import begin_folder, check_folder, command_to_resume, refuse_changes, write_json
from loratory.train.prints import data_print, significant, versions
from loratory.train.result import Result, figures, peak_memory, words
from loratory.train.settings import ADAPT_OPTIONS, TrainSettings, is_bridge, read_settings
from loratory.train.start import collected, own_checkpoint, planned_method

Say = Callable[[str], None]
BEFORE = "before.json"


def train(
    settings: TrainSettings | None = None, *, say: Say = print, callbacks: Sequence[Any] = (), **keys: Any
) -> Result:
    """Train an adapter. Settings come as one object, or as keys (`train(base=..., train=..., rank=8)`).

    say: called with each line of progress. callbacks: further ones of transformers' Trainer. Raises ValueError, FileNotFoundError, FileExistsError for mistakes in the settings
    or the data, FloatingPointError when loss or gradient become nan, OSError when the disk is full, MemoryError when memory is.
    """
    if (settings is None) == (not keys):
        raise TypeError("train takes either one TrainSettings object or settings as keywords, not both and not neither")
    settings = settings or read_settings(keys)
    if not announces():
        say = silent
    try:
        return _train(settings, say, callbacks, time.monotonic())
    except (MemoryError, RuntimeError) as e:
        if out_of_memory(e):
            raise MemoryError(memory_advice(settings)) from e
        raise


def announces() -> bool:
    """Whether this process tells what happens: the first one that torchrun or accelerate started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def silent(text: str) -> None:
    """Says nothing."""


CHUNKS = {"fast": 2**31, "balanced": 512, "lean": 128}  # positions that the head sees at a time


@dataclass(frozen=True)
class Prepared:
    """A run before its first step: model adapted, rows encoded."""

    settings: TrainSettings
    attached: Attached
    tokenizer: Any
    task: Task
    data: Data
    encoded: dict[str, Encoded]
    device: str

    @property
    def model(self) -> Any:
        return self.attached.model

    def record(self) -> dict[str, Any]:
        """What must be the same when the run is resumed."""
        data = {name: data_print(each) for name, each in self.encoded.items()}
        return {"settings": significant(self.settings), "data": data, "versions": versions()}

    def measure_test(self) -> dict[str, float]:
        """Figures on the test rows; empty without them."""
        from loratory.train.trainer import kept_generators

        if not self.data.test:
            return {}
        with kept_generators():
            return figures(
                self.task.evaluate(self.model, self.tokenizer, self.data.test, self.settings.per_device_eval_batch_size)
            )


def _train(settings: TrainSettings, say: Say, callbacks: Sequence[Any], started: float) -> Result:
    from loratory.train.arguments import training_arguments
    from loratory.train.callbacks import Interrupt, Progress, StepPeak
    from loratory.train.planned import foresee

    output = check_folder(settings)
    run = prepare(settings, say)
    summary = run.attached.summary()
    say(str(summary))
    foreseen = foresee(run) if is_main_process() and summary.trained and not settings.dry_run else None
    result = Result(
        str(output),
        trained=summary.trained,
        total=summary.total,
        predicted_peak=None if foreseen is None else foreseen.peak,
    )
    arguments = training_arguments(settings, run.device, run.task.best_metric)
    together = settings.per_device_train_batch_size * processes()
    several = f" in {processes()} processes" if processes() > 1 else ""
    plan = f"{-(-len(run.encoded['train']) // together)} batches an epoch on {run.device}{several}, {settings.dtype}"
    if settings.dry_run:
        say(f"dry run: {plan}; nothing was trained and nothing written")
        return replace(result, stopped="dry run", seconds=time.monotonic() - started)
    say(plan)
    wait()  # every process has seen the folder as it was
    if is_main_process():
        begin_folder(settings, output, say)
    wait()
    record = run.record()
    resume_from = find_checkpoint(settings, output, record, say)
    interrupt = Interrupt(say)
    watchers = watch(settings, arguments, interrupt)
    trainer = make_trainer(run, arguments, record, watchers, callbacks)
    before = measure_before(run, trainer, output, resume_from is not None, say)
    result = replace(result, before=before["dev"], test_before=before["test"])

    if not summary.trained:
        say("the method trains nothing, so this run only measures")
        result = replace(result, after=figures(trainer.evaluate()), test_after=run.measure_test())
        return finish(result, output, started)

    held = StepPeak(0 if foreseen is None else foreseen.resting)
    trainer.add_callback(held)
    progress = Progress(say, lambda: trainer.tokens_seen, unit=run.task.unit)
    add_callbacks(trainer, watchers, output, before["dev"], progress)
    ended = ckpt.read_state(resume_from)[0]["stopped"] if resume_from is not None else None
    if resume_from is not None and ended in ("done", "early stopping"):
        trainer.take_up(resume_from)  # killed after its last step: only the adapter is still to be written
    else:
        try:
            with interrupt:
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from is not None else None)
        finally:
            progress.close()
        ended = why_stopped(watchers) or "done"
    state = trainer.state
    result = replace(
        result,
        training_peak=held.peak,
        history=state.log_history,
        steps=state.global_step,
        best_step=state.best_global_step,
        stopped=str(ended),
    )
    if ended in ("interrupted", "time"):
        say(
            f"stopped at step {state.global_step} of {state.max_steps} ({ended}); go on with: {command_to_resume(settings)}"
        )
    if ended == "interrupted":
        return replace(result, seconds=time.monotonic() - started, peak_memory=peak_memory())

    taken, best = state.global_step, trainer.best_checkpoint()
    if (
        settings.load_best_model_at_end
        and best is not None
        and best.is_dir()
        and state.best_global_step not in (None, taken)
    ):
        run.attached.restore(best)
        taken = int(state.best_global_step)
        say(f"taking the best checkpoint: step {taken}, {arguments.metric_for_best_model} {state.best_metric:.4f}")
    for note in run.attached.summary().notes:
        if note not in summary.notes:
            say(note)  # what training has changed
    logged = [
        line for line in state.log_history if line["step"] == taken and any(key.startswith("eval_") for key in line)
    ]
    dev = {key: value for key, value in logged[-1].items() if key.startswith("eval_")} if logged else trainer.evaluate()
    if run.data.test:
        say(f"measuring on {len(run.data.test)} test rows")
    result = replace(result, adapter=str(output / "adapter"), after=figures(dev), test_after=run.measure_test())
    result = replace(result, seconds=time.monotonic() - started, peak_memory=peak_memory())
    base = str(Path(settings.base).resolve()) if os.path.exists(settings.base) else settings.base
    outcome = {key: value for key, value in asdict(result).items() if key != "history"}
    trainer.save_final(
        output / "adapter",
        record | {"base": base, "task": run.task.settings(), "settings": settings.flat(), "result": outcome},
    )
    return finish(result, output, started)


# -- before the first step ---------------------------------------------------------------------------------------------


def prepare(settings: TrainSettings, say: Say) -> Prepared:
    """Rows, base and adapter; says what will be trained on."""
    from transformers import set_seed

    from loratory.train.base import load_base

    device = pick_device(settings.device)
    data = read_data(settings.train, dev=settings.dev, test=settings.test, text_by=settings.text_by, seed=settings.seed)
    data = replace(
        data,
        train=data.train[: settings.train_rows],
        dev=data.dev[: settings.dev_rows],
        test=data.test[: settings.test_rows] if settings.measure_test else [],
    )
    task = make_task(settings.task, **settings.task_options).resolve(data.train)
    for note in (*data.notes, *task.notes()):
        say(note)
    set_seed(settings.seed)  # new heads and adapters start from here
    model, tokenizer = load_base(
        settings.base,
        task.auto_class,
        dtype=settings.dtype,
        device=device,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        base_format=settings.base_format,
        processor_class=task.processor_class,
        **task.model_kwargs(),
    )
    if settings.quantize is not None:
        lt.quantize(model, settings.quantize, exclude=list(settings.also_train) or None)
    encoded = {"train": task.encode(data.train, tokenizer), "dev": task.encode(data.dev, tokenizer)}
    for name, each in encoded.items():
        say(f"{name}: {task.counts(each)}")
    for note in dict.fromkeys(note for each in encoded.values() for note in each.notes):
        say(note)
    say(f"the first training example:\n{task.preview(encoded['train'], tokenizer)}")
    rows = encoded["train"]
    collect = partial(collected, model, settings=settings, task=task, encoded=rows, tokenizer=tokenizer, say=say)
    attached = adapt(model, settings, task, len(rows), say, collect)
    if settings.packing:
        check_packing(attached.model)
    return Prepared(settings, attached, tokenizer, task, data, encoded, device)


def adapt(
    model: Any, settings: TrainSettings, task: Task, rows: int, say: Say, collect: Callable[..., Any] | None = None
) -> Attached:
    """Attach the method; a task's own head is trained too, and said. A start from data is taken up where a run is resumed.

    collect(method, place): gathers what the method needs of the data; None on the meta device, where nothing is needed. A language
    model's loss becomes lean where it can, and with memory balanced or lean cheap activations are made again.
    """
    if settings.packing:
        refuse_packing(settings, task)
    attached = attach(model, settings, task, rows, say, collect)
    if task.auto_class == "AutoModelForCausalLM" and attached.summary().trained:
        lean = lt.lean_loss(attached.model, chunk=CHUNKS[settings.memory])
        if lean.aside is not None:
            say(f"the logits of a batch are held whole: {lean.aside}")
    if settings.memory != "fast":
        lt.lean_activations(attached.model)
    return attached


def refuse_packing(settings: TrainSettings, task: Task) -> None:
    """Raises ValueError where one row cannot hold several examples."""
    if task.auto_class != "AutoModelForCausalLM":
        raise ValueError(
            f"packing is for language models, and task '{task.name}' has an answer for each row; leave it out"
        )
    if not is_bridge(settings.method) and method_class(settings.method).acts_on == "body":
        raise ValueError(
            f"packing puts several examples into one row, and {settings.method} puts its tokens before the row's first alone; leave it out"
        )


def attach(
    model: Any, settings: TrainSettings, task: Task, rows: int, say: Say, collect: Callable[..., Any] | None
) -> Attached:
    if is_bridge(settings.method):
        from loratory.train import peft_bridge

        return peft_bridge.attach(model, settings, task, rows)
    method = planned_method(settings, rows)
    options = {key: value for key, value in settings.method_options.items() if key in ADAPT_OPTIONS}
    also = list(settings.also_train)
    if method.trains == "factors":
        options |= {"where": settings.where, "exclude": settings.exclude}
        if heads := [name for name in task.head_modules(model) if name not in also]:
            say(f"the head {', '.join(heads)} is this task's own, so it is trained in full and saved with the adapter")
            also += heads
    if method.needs and collect is not None:
        if (begun := own_checkpoint(settings)) is not None:
            lt.load(model, begun, trainable=True)
            return Own(model)
        place: dict[str, Any] = {k: v for k, v in options.items() if k in ("where", "exclude", "blocks")}
        options["seen"] = collect(method, place)
    lt.adapt(model, method, also_train=also, bias=settings.bias, per_layer=settings.per_layer, **options)
    return Own(model)


def pick_device(asked: str) -> str:
    """cpu, cuda or mps. Raises ValueError or RuntimeError for a device that cannot be used."""
    from loratory.train.base import check_device

    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # torchrun's processes take one GPU each
    device = check_device(asked)
    if device.index:
        raise ValueError(
            f"device is {asked}, but a run takes the first GPU it sees; set CUDA_VISIBLE_DEVICES={device.index} and device: cuda"
        )
    return device.type


def find_checkpoint(settings: TrainSettings, output: Path, record: dict[str, Any], say: Say) -> Path | None:
    """The checkpoint to go on from, after checking that it belongs to this run."""
    if not settings.resume:
        return None
    found = ckpt.last_checkpoint(output)
    if found is None:
        say(f"there is no checkpoint in {output} yet, so the run starts from step 0")
        return None
    refuse_changes(ckpt.read_state(found)[0]["run"], record, found, say)
    say(f"resuming from {found}")
    return found


# -- the trainer and what watches it -----------------------------------------------------------------------------------


def watch(settings: TrainSettings, arguments: Any, interrupt: Any) -> dict[str, Any]:
    """What may end a run before its last step: name -> callback with `stopped`."""
    from loratory.train.callbacks import EarlyStopping, TimeLimit

    watchers: dict[str, Any] = {}
    if settings.early_stopping_patience is not None:
        metric, greater = arguments.metric_for_best_model, arguments.greater_is_better
        watchers["early stopping"] = EarlyStopping(
            metric, greater, settings.early_stopping_patience, settings.early_stopping_threshold
        )
    watchers["interrupted"] = interrupt
    if settings.max_minutes is not None:
        watchers["time"] = TimeLimit(settings.max_minutes)
    return watchers


def why_stopped(watchers: dict[str, Any]) -> str | None:
    return next((name for name, watcher in watchers.items() if watcher.stopped), None)


def make_trainer(
    run: Prepared, arguments: Any, record: dict[str, Any], watchers: dict[str, Any], callbacks: Sequence[Any]
) -> Any:
    from loratory.train.callbacks import GiveBack
    from loratory.train.trainer import LoraTrainer

    return LoraTrainer(
        run.model,
        arguments,
        train_dataset=run.encoded["train"],
        eval_dataset=run.encoded["dev"],
        data_collator=run.task.collator(run.tokenizer),
        packed=PackBatch() if run.settings.packing else None,
        compute_metrics=run.task.metrics(),
        preprocess_logits_for_metrics=run.task.reduce_logits,
        record=record,
        attached=run.attached,
        limit=run.settings.save_total_limit,
        mean_loss=not run.task.auto_class.endswith("LM"),
        why_stopped=lambda: why_stopped(watchers),
        callbacks=[*callbacks, *([GiveBack()] if run.settings.memory == "lean" and run.device == "cpu" else [])],
    )


def add_callbacks(
    trainer: Any, watchers: dict[str, Any], output: Path, before: dict[str, float], progress: Any
) -> None:
    """They come after the first measurement, which is no part of the run."""
    from loratory.train.callbacks import Metrics

    telling = (Metrics(output / "metrics.jsonl", before), progress) if is_main_process() else ()
    for callback in (*watchers.values(), *telling):
        trainer.add_callback(callback)


def measure_before(run: Prepared, trainer: Any, output: Path, resumed: bool, say: Say) -> dict[str, dict[str, float]]:
    """Figures of the model before training; a resumed run reads what the first one measured."""
    file = output / BEFORE
    if resumed and file.is_file():
        return dict(json.loads(file.read_text()))
    if not run.settings.eval_before:
        return {"dev": {}, "test": {}}
    rows = f"{len(run.encoded['dev'])} dev" + (f" and {len(run.data.test)} test" if run.data.test else "")
    say(f"measuring on {rows} rows before training (--no-eval_before leaves this out)")
    before = {"dev": figures(trainer.evaluate()), "test": run.measure_test()}
    if is_main_process():
        write_json(file, before)
    say("before training: " + "; ".join(f"{name} {words(each)}" for name, each in before.items() if each))
    return before


def finish(result: Result, output: Path, started: float) -> Result:
    result = replace(result, seconds=time.monotonic() - started, peak_memory=peak_memory())
    if is_main_process():
        write_json(output / "result.json", asdict(result))
    wait()
    return result


# -- memory ------------------------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_advice(settings: TrainSettings) -> str:
    """What to change, the cheapest first."""
    batch, steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    half = max(1, batch // 2)
    advice = (
        [
            f"per_device_train_batch_size {half} with gradient_accumulation_steps {steps * batch // half} (now {batch} and {steps})"
        ]
        if batch > 1
        else []
    )
    advice += [] if settings.gradient_checkpointing else ["gradient_checkpointing true"]
    advice += [] if settings.dtype == "bfloat16" else ["dtype bfloat16"]
    return f"memory ran out; try, in this order: {', '.join([*advice, 'a smaller max_length', 'a smaller base'])}"
