"""Jobs on this machine: a few at once, each in its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress

from loratory.compare.jobs import Answer, Job, begin, ended, tell
from loratory.compare.nursery import Nursery

PATIENCE = 60.0  # seconds that a run has to save and end


class LocalPool:
    """Up to `size` jobs at once, each with `threads` threads; see `Pool`."""

    def __init__(self, size: int, threads: int) -> None:
        self.size, self.threads = size, threads
        self.jobs: dict[str, Job] = {}  # the job's file -> what runs
        self.workers: dict[str, subprocess.Popen[bytes]] = {}  # where processes cannot be forked
        self.nursery: Nursery | None = None
        self.left: list[tuple[Job, int]] = []  # ended, and not yet handed back

    def start(self, job: Job) -> None:
        if not hasattr(os, "fork"):
            file = str(job.answer)
            self.workers[file] = begin(job, self.threads)
        else:
            self.nursery = self.nursery or Nursery()
            file = str(told := tell(job))
            self.nursery.start(told, self.threads)
        self.jobs[file] = job

    def running(self) -> int:
        return len(self.jobs) + len(self.left)

    def next(self) -> tuple[Job, Answer]:
        while not self.left:
            self.left += [(self.jobs.pop(file), code) for file, code in self.codes().items()]
        job, code = self.left.pop(0)
        return job, ended(job, code)

    def codes(self) -> dict[str, int]:
        """Files of the jobs that have ended since the last call, with their exit codes."""
        if self.nursery is not None:
            return self.nursery.ended(patience=0.5)
        time.sleep(0.05)
        found = {file: code for file, worker in self.workers.items() if (code := worker.poll()) is not None}
        for file in found:
            del self.workers[file]
        return found

    def stop(self) -> None:
        told: set[int] = set()
        end = time.monotonic() + PATIENCE
        while self.jobs and time.monotonic() < end:
            for pid in self.pids() - told:  # some begin only now
                told.add(pid)
                with suppress(ProcessLookupError):  # ended, and not read yet
                    os.kill(pid, signal.SIGINT)
            for file in self.codes():
                self.jobs.pop(file, None)
        self.close()

    def pids(self) -> set[int]:
        """Workers that are known to run."""
        forked = self.nursery.pids.values() if self.nursery else ()
        return {*(worker.pid for worker in self.workers.values()), *forked}

    def close(self) -> None:
        """Kill what still runs, and end the process that starts runs."""
        for worker in self.workers.values():
            worker.kill()
        if self.nursery is not None:
            self.nursery.close()
            self.nursery = None
        self.jobs.clear()
