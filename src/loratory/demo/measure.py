"""Doing the demo's jobs: train with the library's own `train`, reload the adapter from its file, measure on held-out rows."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import loratory as lt
from loratory.demo.outcome import Measured, Outcome, Points, places, shown
from loratory.demo.plan import DRAWS, SAMPLE_SEED, Arm, Job
from loratory.methods.registry import method_class
from loratory.tasks import Task, make_task
from loratory.tasks.data import read_rows
from loratory.tasks.rows import Rows
from loratory.train import Result, train
from loratory.train.base import load_base
from loratory.train.callbacks import clock
from loratory.train.opened import open_adapter
from loratory.train.run import pick_device
from loratory.train.settings import TrainSettings, read_settings

EXAMPLES = 5
Say = Callable[[str], None]
Ready = tuple[Any, Any, Task, dict[str, Any]]  # model, tokenizer, task, and what training came to


def split_file(data: Path, job: Job, split: str) -> Path:
    return data / job.data / f"{split}.{job.ending}"


def measure_job(outcome: Outcome, data: Path, runs: Path, say: Say) -> None:
    """Do every arm of a job, and add each to `outcome` as soon as it is finished. Raises KeyboardInterrupt on Ctrl-C."""
    job = outcome.job
    every = read_rows(split_file(data, job, "test"))
    test = random.Random(SAMPLE_SEED).sample(every, min(job.test_rows, len(every)))  # a file may be sorted by label
    outcome.rows = {"test": len(test), "test_all": len(every)}
    chosen = [row for row in test if not job.needs_entity or any(tag != "O" for tag in row["tags"])][:EXAMPLES]
    outcome.examples = [(given(job, row), right(job, row)) for row in chosen]
    test.sort(key=lambda row: len(given(job, row)))  # rows of one length together need little padding
    said: set[str] = set()

    def once(line: str) -> None:  # the data and the first example are the same for every arm of a job
        if line not in said:
            said.add(line)
            say("\n".join("    " + part for part in line.splitlines()))

    for arm in job.arms:
        began = time.monotonic()
        say(
            f"  {arm.label}: "
            + (f"{job.steps} steps of {job.batch} rows" if arm.method else f"{job.base_title} as it is")
        )
        run = runs / f"{job.name}-{arm.label.replace(' ', '-').lower()}"
        model, tokenizer, task, found = trained_arm(job, arm, data, run, outcome, once) if arm.method else base_arm(job)
        metrics, answers = answer(model, tokenizer, task, job, test, chosen, say)
        last = Measured(arm=arm, metrics=metrics, answers=answers, **found)
        del model
        outcome.arms.append(last)
        scores = ", ".join(f"{name} {shown(last, name, places(job))}" for name in job.scores)
        say(f"  {arm.label}: {scores} on {len(test)} held-out rows; {clock(time.monotonic() - began)}")
        if job.task == "chat" and outcome.examples:
            say(f"    facts: {outcome.examples[0][0]}\n    {arm.label}: {last.answers[0]}")


def base_arm(job: Job) -> Ready:
    """The base as it is."""
    task = make_task(job.task, **job.task_options)
    model, tokenizer = load_base(job.base, task.auto_class, device=pick_device("auto"))
    return model, tokenizer, task, {"total": sum(p.numel() for p in model.parameters())}


def trained_arm(job: Job, arm: Arm, data: Path, run: Path, outcome: Outcome, say: Say) -> Ready:
    """The base with an adapter that was trained, saved, loaded from its file and merged (a head alone has nothing to merge)."""
    clean = fresh_peak()
    result = train(run_settings(job, arm, data, run), say=say)
    if result.stopped == "interrupted" or result.adapter is None:
        raise KeyboardInterrupt
    gc.collect()
    opened = open_adapter(result.adapter)
    if opened.task is None:
        raise RuntimeError(f"{result.adapter} does not hold its task; delete {run} and run the demo again")
    outcome.rows |= {split: record["rows"] for split, record in opened.training["data"].items()}
    found: dict[str, Any] = {
        "trained": result.trained,
        "total": result.total,
        "steps": result.steps,
        "seconds": result.seconds,
        "peak_memory": result.peak_memory if clean else None,
        **curves(result, job.dev_score[0]),
    }
    if method_class(str(arm.method)).trains == "factors":
        check = lt.merge(opened.model)
        say(f"reloaded and merged: {check}")
        found["merge_error"] = check.relative
    return opened.model, opened.tokenizer, opened.task, found


def run_settings(job: Job, arm: Arm, data: Path, run: Path) -> TrainSettings:
    """The settings of one training run, as `loratory train` would take them."""
    return read_settings(
        {
            "base": job.base,
            "task": job.task,
            "train": str(split_file(data, job, "train")),
            "dev": str(split_file(data, job, "dev")),
            "dev_rows": job.dev_rows,
            "method": arm.method,
            "output_dir": str(run),
            "overwrite": True,
            "learning_rate": arm.learning_rate,
            "max_steps": job.steps,
            "per_device_train_batch_size": job.batch,
            "per_device_eval_batch_size": min(job.dev_rows, job.measured_at_once),
            "eval_steps": max(1, job.steps // job.evaluations),
            "logging_steps": max(1, job.steps // 10),
            "save_total_limit": 1,
        }
        | job.task_options
        | arm.options
    )


def curves(result: Result, dev: str) -> dict[str, Points]:
    """Training loss and dev score by step; the last value of a step counts."""
    score = f"eval_{dev}"
    loss = {int(line["step"]): float(line["loss"]) for line in result.history if "loss" in line}
    before = {0: result.before[dev]} if dev in result.before else {}
    seen = before | {int(line["step"]): float(line[score]) for line in result.history if score in line}
    return {"loss": sorted(loss.items()), "dev": sorted(seen.items())}


def answer(
    model: Any, tokenizer: Any, task: Task, job: Job, test: Rows, chosen: Rows, say: Say
) -> tuple[dict[str, float], list[str]]:
    """Metrics with intervals on the test rows, and what was answered to the chosen ones."""
    found: list[Any] = []
    began = time.monotonic()
    for start in range(0, len(test), job.measured_at_once):
        part = test[start : start + job.measured_at_once]
        found += task.predict(model, tokenizer, part, job.measured_at_once)
        if start + len(part) == len(test) or (start // job.measured_at_once) % 5 == 4 or job.task == "chat":
            say(f"    measured {start + len(part)} of {len(test)} test rows, {clock(time.monotonic() - began)}")
    place = {id(row): index for index, row in enumerate(test)}
    return task.score(found, test, draws=DRAWS), [words(job, row, found[place[id(row)]]) for row in chosen]


# -- rows and answers as text ------------------------------------------------------------------------------------------


def given(job: Job, row: Mapping[str, Any]) -> str:
    """What the model gets."""
    return (
        str(row["mr"])
        if job.task == "chat"
        else str(row["text"])
        if job.task == "classification"
        else " ".join(row["tokens"])
    )


def right(job: Job, row: Mapping[str, Any]) -> str:
    """The right answer (the first of several)."""
    if job.task == "chat":
        return str(row["refs"][0])
    return words(job, row, row["label"] if job.task == "classification" else row["tags"])


def words(job: Job, row: Mapping[str, Any], found: Any) -> str:
    """An answer as text; tags as the entities that they mark."""
    if job.task == "classification":
        return str(found).replace("_", " ")
    return found if job.task == "chat" else entities(row["tokens"], found)


def entities(tokens: Sequence[str], tags: Sequence[str]) -> str:
    """The marked words, entities apart by a bar."""
    marked: list[list[str]] = []
    inside = False
    for token, tag in zip(tokens, tags, strict=True):
        if tag.startswith("B-"):
            marked.append([token])
        elif inside and tag.startswith("I-"):
            marked[-1].append(token)
        inside = tag.startswith("B-") or (inside and tag.startswith("I-"))
    return " | ".join(" ".join(each) for each in marked) or "(none)"


def fresh_peak() -> bool:
    """Start the count of peak memory anew. Returns whether that was possible: it needs a GPU, or Linux."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    if not sys.platform.startswith("linux"):
        return False
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the run before has freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # no permission in this container; or another C library than glibc
        return False
    return True
