"""A process that has imported everything and forks a worker for each job, so that a job starts at once and is alone all the same.

`python -m loratory.compare.nursery` reads lines `JOB.json THREADS` and writes lines `began JOB.json PID` and `ended JOB.json CODE`.
It computes nothing itself, so no thread and no CUDA context exists that a fork would break.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from loratory.compare.jobs import LOG

WORDS = "\t"  # between the words of a line: paths may hold spaces


def serve() -> None:
    """Until standard input ends; workers that still run then are killed."""
    import loratory.compare.clock
    import loratory.compare.worker
    import loratory.train.callbacks
    import loratory.train.opened
    import loratory.train.trainer  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workers: dict[int, str] = {}
    pending = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            read = os.read(0, 65536)
            if not read:
                break
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                file, threads = line.decode().split(WORDS)
                workers[fork(file, int(threads))] = file
        for pid in list(workers):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                say("ended", workers.pop(pid), os.waitstatus_to_exitcode(status))
    for pid in workers:
        os.kill(pid, signal.SIGKILL)


def fork(file: str, threads: int) -> int:
    """A worker for the job of this file."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("began", file, os.getpid())  # from now on a signal ends it
        nothing, log = (
            os.open(os.devnull, os.O_RDONLY),
            os.open(Path(file).with_name(LOG), os.O_WRONLY | os.O_APPEND | os.O_CREAT),
        )
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        from loratory.compare.worker import main

        code = main(file, threads)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def say(*words: object) -> None:
    os.write(1, (WORDS.join(map(str, words)) + "\n").encode())


class Nursery:
    """The other end: starts workers, and tells which have ended."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "loratory.compare.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal goes to the comparison, which tells its workers
        )
        self.pids: dict[str, int] = {}  # job file -> its worker
        self.pending = b""

    def start(self, file: Path, threads: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{file}{WORDS}{threads}\n".encode())
        self.process.stdin.flush()

    def ended(self, patience: float) -> dict[str, int]:
        """Job files whose workers have ended, with their exit codes; waits so many seconds for the first. Raises RuntimeError if it died."""
        assert self.process.stdout is not None
        codes: dict[str, int] = {}
        if select.select([self.process.stdout], [], [], patience)[0]:
            read = os.read(self.process.stdout.fileno(), 65536)
            if not read:
                raise RuntimeError(
                    f"the process that starts runs has ended with code {self.process.wait()}; start the comparison again"
                )
            *lines, self.pending = (self.pending + read).split(b"\n")
            for line in lines:
                what, file, number = line.decode().split(WORDS)
                if what == "began":
                    self.pids[file] = int(number)
                else:
                    self.pids.pop(file, None)
                    codes[file] = int(number)
        return codes

    def close(self) -> None:
        """End it, and with it what still runs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


if __name__ == "__main__":
    serve()
