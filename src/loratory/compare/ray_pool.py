"""Jobs on a Ray cluster, a running one or one on this machine. A task runs the same worker process as the local pool does.

Every node must see the comparison's folder, the data and the base under the same paths, and run the same environment.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from loratory.compare.jobs import Answer, Job, begin, ended

PATIENCE = 60.0  # seconds that a run has to save and end


class RayPool:
    """Jobs as Ray tasks of `threads` CPUs each (and a GPU, where the cluster has some); see `Pool`."""

    def __init__(self, threads: int, size: int | None = None, address: str | None = None) -> None:
        ray = require_ray()
        self.ours = not ray.is_initialized()
        if self.ours:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0))
        fit = gpus or int(have.get("CPU", 1) // threads)
        if fit < 1:
            raise ValueError(
                f"threads is {threads}, but the Ray cluster has {have.get('CPU', 0):.0f} CPUs, so no run could start; lower threads"
            )
        self.size, self.threads, self.ray = min(size or fit, fit), threads, ray
        task = ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0, max_retries=0)(work)
        self.task: Any = task
        self.jobs: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        stop = Path(job.folder) / "stop"
        stop.unlink(missing_ok=True)
        self.jobs[self.task.remote(job, self.threads)] = job

    def running(self) -> int:
        return len(self.jobs)

    def next(self) -> tuple[Job, Answer]:
        (reference,), _ = self.ray.wait(list(self.jobs), num_returns=1)
        job = self.jobs.pop(reference)
        try:
            return job, self.ray.get(reference)
        except self.ray.exceptions.RayError as error:  # a node or a Ray worker died
            return job, {"status": "killed", "error": f"Ray lost the run: {' '.join(str(error).split())[:300]}"}

    def stop(self) -> None:
        for job in self.jobs.values():
            (Path(job.folder) / "stop").touch()
        if self.jobs:
            self.ray.wait(list(self.jobs), num_returns=len(self.jobs), timeout=PATIENCE)
            for reference in self.jobs:
                self.ray.cancel(reference, force=True)
        self.jobs.clear()
        self.close()

    def close(self) -> None:
        """Leave the cluster, and end it where it was started here."""
        if self.ours and self.ray.is_initialized():
            self.ray.shutdown()


def require_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("engine ray needs Ray; run: pip install 'loratory[ray]', or leave engine out") from error
    return ray


def work(job: Job, threads: int) -> Answer:
    """In a Ray task: the worker process, ended by the file `stop` as by Ctrl-C."""
    worker = begin(job, threads)
    stop = Path(job.folder) / "stop"
    try:
        while (code := worker.poll()) is None:
            if stop.exists():
                stop.unlink()
                worker.send_signal(signal.SIGINT)
            time.sleep(0.05)
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait(timeout=PATIENCE)
    return ended(job, code)
