"""`python -m loratory.compare.worker JOB.json THREADS`: does one job, and leaves its answer beside it."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from loratory.compare.jobs import Answer, Job
from loratory.compare.splits import fingerprint, read_splits
from loratory.store.atomic import to_json, write_files
from loratory.train.folder import SETTINGS, write_text
from loratory.train.result import figures
from loratory.train.run import Prepared, prepare, train
from loratory.train.settings import TrainSettings, is_bridge, read_settings

RUN = "run"  # output_dir of the training run, inside the job's folder
TIMED_STEPS = 8
CURVE_POINTS = 20  # of the training loss, where a run is too short for a line each 10 steps


def main(file: str, threads: int) -> int:
    import torch

    torch.set_flush_denormal(True)  # before the first thread starts: those that follow inherit it
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    job = Job(**json.loads(Path(file).read_text(encoding="utf-8")))
    write_text(job.answer.with_suffix(".pid"), f"{os.getpid()}\n")
    try:
        answer = WORK[job.kind](job, read_settings(job.settings))
        to_json(answer)  # what JSON cannot hold is an error like others
    except KeyboardInterrupt:
        answer = {"status": "interrupted", "error": "stopped by Ctrl-C"}
    except FloatingPointError as error:
        answer = {"status": "diverged", "error": str(error)}
    except Exception as error:
        traceback.print_exc()
        lost = "holds NaN or infinity" in str(error)  # after the last step no loss tells, and the adapter is not saved
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        answer = {"status": "diverged" if lost else "failed", "error": text}
    write_files(job.answer.parent, {job.answer.name: to_json(answer)})
    return 0


def end_with_parent(parent: int) -> None:
    """A comparison that was killed leaves no run behind that a second one would meet."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def check_rows(job: Job, settings: TrainSettings) -> Any:
    """The rows, after checking that they are those of the comparison."""
    data = read_splits(settings)
    if fingerprint(data) != job.fingerprint:
        raise ValueError(
            "the rows have changed since the comparison began, so this run would not be comparable; put them back, or start "
            "another comparison in another folder"
        )
    return data


def train_run(job: Job, settings: TrainSettings) -> Answer:
    """Train, from the last checkpoint where there is one. No test row is read by the run."""
    check_rows(job, settings)
    from loratory.compare.clock import Clock, seconds_before

    place = Path(settings.output_dir)
    begun = (place / SETTINGS).exists()
    before = seconds_before(Path(job.folder), place)
    settings_now = {**job.settings, "resume": begun}
    if settings.max_steps > 0:
        settings_now.setdefault(
            "logging_steps", min(settings.logging_steps, max(1, settings.max_steps // CURVE_POINTS))
        )
    result = train(read_settings(settings_now), callbacks=[Clock(Path(job.folder), before)])
    if result.stopped == "interrupted":
        return {"status": "interrupted", "error": "stopped by Ctrl-C; it goes on from its checkpoint"}
    for folder in place.glob("checkpoint-*"):
        shutil.rmtree(folder)
    times = [float(line["train_runtime"]) for line in result.history if "train_runtime" in line]
    if job.metric not in result.after:  # it holds finite figures alone
        return {"status": "diverged", "error": f"{job.metric} on dev is nan or inf after the last step"}
    return {
        "status": "done",
        "error": None,
        "trained": result.trained,
        "total": result.total,
        "adapter": result.adapter,
        "adapter_bytes": adapter_size(result.adapter),
        "peak_memory": result.peak_memory,
        "seconds": before + times[-1] if times else before or result.seconds,
        "steps": result.steps,
        "dev": result.after,
        "loss_curve": curve(result.history, "loss"),
        "dev_curve": curve(result.history, f"eval_{job.metric}"),
        "versions": all_versions(settings),
    }


def adapter_size(folder: str | None) -> int:
    """Bytes of the adapter's tensors file; 0 where nothing was trained."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) if folder else 0


def curve(history: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value), without those that are nan or inf; the last value of a step counts."""
    points = {int(line["step"]): float(line[key]) for line in history if key in line}
    return [(step, value) for step, value in sorted(points.items()) if math.isfinite(value)]


def all_versions(settings: TrainSettings) -> dict[str, str]:
    from loratory.train.prints import versions

    found = versions()
    if is_bridge(settings.method):
        import peft

        found |= {"peft": str(peft.__version__)}
    return found


def test_run(job: Job, settings: TrainSettings) -> Answer:
    """Load the finished adapter from its file, and score it on the test rows."""
    data = check_rows(job, settings)
    adapter = Path(settings.output_dir) / "adapter"
    model, tokenizer, task = opened(adapter, settings) if adapter.is_dir() else as_it_is(settings)
    metrics, each = task.measure(model, tokenizer, data.test, settings.per_device_eval_batch_size, metric=job.metric)
    test = figures(metrics)  # finite ones alone
    if job.metric not in test or not all(map(math.isfinite, each)):
        return {"status": "diverged", "error": f"{job.metric} on test is nan or inf, or that of a row is"}
    return {"status": "done", "error": None, "test": test, "test_each": each}


def opened(adapter: Path, settings: TrainSettings) -> tuple[Any, Any, Any]:
    from loratory.train.opened import open_adapter

    found = open_adapter(adapter, device=settings.device)
    if found.task is None:
        raise RuntimeError(f"{adapter} does not hold its task; delete the folder and run the comparison again")
    return found.model, found.tokenizer, found.task


def as_it_is(settings: TrainSettings) -> tuple[Any, Any, Any]:
    """The base of a method that trains nothing: it has no adapter file. Raises RuntimeError for one that trains."""
    run: Prepared = prepare(settings, print)
    if run.attached.summary().trained:
        raise RuntimeError(
            f"the run's adapter is not in '{settings.output_dir}' any more; put the folder back, or start another comparison with "
            "another out"
        )
    return run.model, run.tokenizer, run.task


def time_run(job: Job, settings: TrainSettings) -> Answer:
    """Seconds of one step, from a few steps without measuring on dev."""
    short = {"max_steps": TIMED_STEPS, "eval_steps": TIMED_STEPS + 1, "save_steps": TIMED_STEPS + 1, "overwrite": True}
    result = train(read_settings({**job.settings, **short}))
    if result.stopped == "interrupted":
        return {"status": "interrupted", "error": "stopped by Ctrl-C"}
    times = [float(line["train_runtime"]) for line in result.history if "train_runtime" in line]
    return {"status": "done", "error": None, "step_seconds": times[-1] / TIMED_STEPS}


WORK = {"train": train_run, "test": test_run, "time": time_run}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
