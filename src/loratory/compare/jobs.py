"""A job: one training run, one measurement on test, or a few timed steps, each in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from loratory.store.atomic import to_json, write_files

Kind = Literal["train", "test", "time"]
Answer = dict[str, Any]  # `status` and, of a job that was done, what it found
JOB, LOG = "job.json", "log.txt"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told. `folder` is the run's own; `key` is the run's name in the results."""

    kind: Kind
    key: str
    title: str  # for people: "lora, learning rate 1e-3, seed 0"
    folder: str
    settings: dict[str, Any]  # flat train settings
    fingerprint: str  # of the rows it must find
    metric: str

    @property
    def answer(self) -> Path:
        return Path(self.folder) / f"{self.kind}.json"


class Pool(Protocol):
    """Where jobs run."""

    size: int

    def start(self, job: Job) -> None:
        """Begin a job."""

    def running(self) -> int:
        """How many jobs were begun and not handed back."""

    def next(self) -> tuple[Job, Answer]:
        """The next job that ends. Waits for it."""

    def stop(self) -> None:
        """End what runs, as Ctrl-C does: runs save what a later one goes on from."""

    def close(self) -> None:
        """Give back what the pool holds."""


def tell(job: Job) -> Path:
    """Write down what the worker is to do."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    job.answer.unlink(missing_ok=True)
    name = f"{job.kind}-{JOB}"
    write_files(folder, {name: to_json(asdict(job))})
    return folder / name


def begin(job: Job, threads: int) -> subprocess.Popen[bytes]:
    """Start a worker for the job: its own process, so that nothing it does can harm others, and its peak memory is its own."""
    file = tell(job)
    with (file.parent / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "loratory.compare.worker", str(file), str(threads)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in a terminal goes to the comparison, which tells its workers
        )


def ended(job: Job, code: int) -> Answer:
    """What a worker that ended has left."""
    if job.answer.is_file():
        return dict(json.loads(job.answer.read_text(encoding="utf-8")))
    if code < 0:
        name = signal.Signals(-code).name
        why = " (the system kills so when memory is short)" if -code == signal.SIGKILL else ""
        return {"status": "killed", "error": f"the run was killed by {name}{why}; see {Path(job.folder) / LOG}"}
    return {"status": "failed", "error": f"the run ended with code {code} and no result; see {Path(job.folder) / LOG}"}
