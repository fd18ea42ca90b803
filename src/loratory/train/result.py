"""What a run came to, and how its figures are read and shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")


@dataclass(frozen=True)
class Result:
    """What a run came to; prints as a table."""

    output_dir: str
    adapter: str | None = (
        None  # its folder; None for a dry run, and where nothing is trained or the run was interrupted
    )
    before: dict[str, float] = field(default_factory=dict)  # on dev
    after: dict[str, float] = field(default_factory=dict)
    test_before: dict[str, float] = field(default_factory=dict)
    test_after: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)  # every logged line
    trained: int = 0  # numbers
    total: int = 0  # numbers of the base
    steps: int = 0
    best_step: int | None = None
    stopped: str = "done"  # done, early stopping, time, interrupted, dry run
    seconds: float = 0.0
    peak_memory: int = 0  # bytes
    predicted_peak: int | None = (
        None  # bytes of a training step's tensors, as `plan` says; None: it could not be planned
    )
    training_peak: int | None = (
        None  # the same as it came; None where something else made the peak, so that it is not known
    )

    def __str__(self) -> str:
        lines = []
        for title, before, after in (("dev", self.before, self.after), ("test", self.test_before, self.test_after)):
            for key in after or before:
                cells = [f"{values[key]:.4f}" if key in values else "" for values in (before, after)]
                lines.append(f"{title + ' ' + key:24}{cells[0]:>12}{cells[1]:>12}")
        if lines:
            lines.insert(0, f"{'':24}{'before':>12}{'after':>12}")
        lines.append(
            f"{self.steps} steps in {self.seconds:.0f} s ({self.stopped}), {self.trained:,} of {self.total:,} numbers trained, "
            f"peak memory {self.peak_memory / 2**20:,.0f} MiB"
        )
        if self.predicted_peak is not None and self.training_peak is not None:
            lines.append(
                f"memory of a training step: predicted {self.predicted_peak / 2**20:,.0f} MiB, came {self.training_peak / 2**20:,.0f} MiB"
            )
        return "\n".join([*lines, f"adapter: {self.adapter}"] if self.adapter else lines)


def figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The quality figures of an evaluation: without prefix, without speeds, without what is no number (JSON has no nan).

    Trainer's loss is the mean over batches; where the task counts it over tokens, only that is kept.
    """
    found = {
        key.removeprefix("eval_"): float(value)
        for key, value in metrics.items()
        if not key.endswith(SPEEDS) and isinstance(value, int | float) and math.isfinite(value)
    }
    return {
        key: value
        for key, value in found.items()
        if key not in ("loss", "step") or (key == "loss" and "token_loss" not in found)
    }


def words(metrics: Mapping[str, float]) -> str:
    """Figures on one line."""
    return ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def high_water() -> int | None:
    """The most bytes there ever were: on the GPU where there is one, else of this process. None where neither is known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def resident() -> int | None:
    """Bytes there are now, of the same."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def _status(key: str) -> int | None:
    """A line of Linux's account of this process."""
    file = Path("/proc/self/status")
    if not file.is_file():
        return None
    found = next((line for line in file.read_text().splitlines() if line.startswith(key)), None)
    return None if found is None else int(found.split()[1]) * 1024
