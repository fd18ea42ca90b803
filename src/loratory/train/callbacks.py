"""What happens beside the steps: progress, metrics file, early stopping, time limit, Ctrl-C."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loratory.runtime.shards import any_process
from loratory.train.result import figures, high_water, resident, words


class Metrics(TrainerCallback):
    """Every logged line also goes to metrics.jsonl; a resumed run first cuts the file back to its checkpoint."""

    def __init__(self, file: Path, before: dict[str, float] | None = None) -> None:
        self.file = file
        self.start = [{**{f"eval_{key}": value for key, value in before.items()}, "step": 0}] if before else []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*self.start, *state.log_history]))
        os.replace(temporary, self.file)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.log_history:
            with self.file.open("a") as stream:
                stream.write(json.dumps(state.log_history[-1]) + "\n")


class StepPeak(TrainerCallback):
    """Peak memory of the training steps before the first evaluation, where they are what made the process's (or the GPU's) peak.

    resting: bytes of the tensors that are there before the first step, which the peak is counted with; on a GPU all are seen.
    """

    def __init__(self, resting: int) -> None:
        self.resting = resting
        self.peak: int | None = None
        self.began: tuple[int, int] | None = None  # resident, and the most that ever was
        self.evaluated = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        high, now = high_water(), resident()
        self.began = None if high is None or now is None else (now, high)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        high = high_water()
        if self.began is None or high is None or self.evaluated or high <= self.began[1]:
            return
        self.peak = high - self.began[0] + self.resting

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.evaluated = True


class GiveBack(TrainerCallback):
    """Freed tensors go back to the system around each step, where the C library (glibc) would keep their holes for later.

    After the optimizer's step counts most: trimming before the forward pass alone left 829 MiB of the everyday job where this leaves 580.
    """

    def __init__(self) -> None:
        self.trim: Callable[[int], int] = lambda pad: 0
        if sys.platform.startswith("linux"):
            with suppress(OSError, AttributeError):  # another C library
                self.trim = ctypes.CDLL("libc.so.6").malloc_trim

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trim(0)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trim(0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trim(0)


class EarlyStopping(TrainerCallback):
    """Stop after `patience` evaluations in a row without a better one. Counts in the log history, so a resumed run agrees."""

    def __init__(self, metric: str, greater: bool, patience: int, threshold: float = 0.0) -> None:
        self.metric, self.sign, self.patience, self.threshold = (
            f"eval_{metric}",
            1 if greater else -1,
            patience,
            threshold,
        )
        self.stopped = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        best, since = None, 0
        for line in state.log_history:
            if self.metric not in line:
                continue
            value = self.sign * line[self.metric]
            if best is None or value > best + self.threshold:
                best, since = value, 0
            else:
                since += 1
        if since >= self.patience:
            self.stopped = control.should_training_stop = True


class TimeLimit(TrainerCallback):
    """Save and stop when the minutes are over."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.stopped = 60 * minutes, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        over = any_process(time.monotonic() - self.start >= self.seconds, args.device)
        if over and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class Interrupt(TrainerCallback):
    """The first Ctrl-C finishes the step, saves and stops; the second one kills. A context manager."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.stopped = say, False

    def __enter__(self) -> Interrupt:
        self.before: Any = None
        if threading.current_thread() is threading.main_thread():  # Python gives signals to that one alone
            self.before = signal.signal(signal.SIGINT, self._first)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.say("Ctrl-C: finishing this step and saving; press it again to stop at once, without saving")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stopped = any_process(self.stopped, args.device)  # or the others would wait for this one
        if self.stopped:
            control.should_save = control.should_training_stop = True


class Progress(TrainerCallback):
    """Loss, speed and time left: a moving bar on a terminal, plain lines elsewhere."""

    def __init__(
        self, say: Callable[[str], None], tokens: Callable[[], int], *, unit: str = "tokens", stream: Any = None
    ) -> None:
        self.say, self.tokens, self.unit = say, tokens, unit
        self.stream = stream if stream is not None else sys.stdout
        self.bar: Any = None
        self.loss = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start, self.first, self.tokens_before = time.monotonic(), state.global_step, self.tokens()
        if not self.stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(*columns, console=Console(file=self.stream), transient=True)
        self.bar.start()
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step, description=f"{self.loss} {self._speed()}".strip())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or not hasattr(self, "start"):
            return
        if "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"
            if self.bar is None:
                left = (
                    (time.monotonic() - self.start)
                    / max(1, state.global_step - self.first)
                    * (state.max_steps - state.global_step)
                )
                parts = [
                    f"step {state.global_step}/{state.max_steps}",
                    self.loss,
                    f"learning rate {logs['learning_rate']:.2e}",
                ]
                self._line(", ".join([*parts, self._speed(), f"{clock(left)} left"]))
        elif shown := words(figures({key: value for key, value in logs.items() if key.startswith("eval_")})):
            self._line(f"step {state.global_step}/{state.max_steps}: dev {shown}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _speed(self) -> str:
        return f"{(self.tokens() - self.tokens_before) / max(1e-9, time.monotonic() - self.start):.0f} {self.unit}/s"

    def _line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False)
        else:
            self.say(text)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
