"""How long a run trained in all: Trainer counts from the last resumption alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loratory.train.checkpoint import last_checkpoint
from loratory.train.folder import write_json

FILE = "seconds.json"  # in the job's folder: step of a checkpoint -> seconds of training until then


class Clock(TrainerCallback):
    """Notes with each checkpoint how long the run trained, `before` seconds of an earlier process included."""

    def __init__(self, folder: Path, before: float) -> None:
        self.file, self.before = folder / FILE, before
        self.noted = noted(folder) if before else {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:  # no checkpoint without a note, whenever the run is killed
            self.on_save(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.noted[state.global_step] = self.before + time.monotonic() - self.start
        write_json(self.file, self.noted)


def noted(folder: Path) -> dict[int, float]:
    """What a clock noted in a job's folder."""
    file = folder / FILE
    return {int(step): seconds for step, seconds in json.loads(file.read_text()).items()} if file.is_file() else {}


def seconds_before(folder: Path, run: Path) -> float:
    """Seconds of training up to the checkpoint from which a run goes on; 0 where it starts anew."""
    found = last_checkpoint(run)
    if found is None:
        return 0.0
    step = int(found.name.removeprefix("checkpoint-"))
    return max((seconds for at, seconds in noted(folder).items() if at <= step), default=0.0)
