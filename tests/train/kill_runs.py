"""Runs that are killed, for test_resume.py: a program that forks a child for each run, so that imports are paid once.

    python kill_runs.py FOLDER PLAN        PLAN: JSON list of runs; prints a JSON list with the outcome of each

A run is {"after_seconds": [x, ...]} (killed then, resumed, killed again, ...), {"before_operation": n}, or {} (never killed); it
is then resumed until it ends. PLAN "count": runs once, and prints how many operations each save has, and the seconds.
"""

import builtins
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import loratory.train.checkpoint as ckpt
from loratory.cli.quiet import quiet
from loratory.train.run import train
from loratory.train.trainer import LoraTrainer

HERE = Path(__file__).parent
SETTINGS = {
    "base": str(HERE.parent / "models" / "stories260k"),
    "task": "chat",
    "prompt_column": "mr",
    "completion_column": "ref",
    "max_length": 48,
    "rank": 2,
    "dropout": 0.2,
    "where": "attention",
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 3,
    "eval_steps": 2,
    "logging_steps": 1,
    "save_total_limit": 1,
    "eval_before": False,
    "device": "cpu",
}
OPERATIONS = {os: ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync", "open")}


def rows(folder: Path) -> None:
    for split, count in (("train", 13), ("dev", 3)):
        lines = [
            {
                "mr": f"name[Place {i}], area[{'north' if i % 2 else 'south'}]",
                "ref": f"Place {i} is there. " * (1 + i % 3),
            }
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


class Operations:
    """Counts file operations while a checkpoint or the final adapter is written, and kills this process before the n-th."""

    def __init__(self, output: Path, fatal: int | None) -> None:
        self.output, self.fatal = str(output), fatal
        self.count, self.inside, self.saves = 0, 0, []

    def watch(self) -> None:
        for name in OPERATIONS[os]:
            setattr(os, name, self.counted(getattr(os, name)))
        builtins.open = io.open = self.counted(builtins.open)
        import safetensors.torch

        safetensors.torch.save_file = self.counted(safetensors.torch.save_file)  # its arguments: tensors, then the path
        for owner, name in ((LoraTrainer, "_save_checkpoint"), (LoraTrainer, "save_final")):
            setattr(owner, name, self.entered(getattr(owner, name)))

    def entered(self, function):
        def run(*args, **kwargs):
            self.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1
                self.saves.append(self.count)

        return run

    def concerns(self, args) -> bool:
        """Whether the operation is on the run's folder: by its path, its number, or a bare name inside an open folder."""
        where = next((a for a in args if isinstance(a, str | int | Path)), "")
        return isinstance(where, int) or str(where).startswith(self.output) or os.sep not in str(where)

    def counted(self, function):
        def run(*args, **kwargs):
            if self.inside and self.concerns(args):
                self.count += 1
                if self.count == self.fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return run


def child(folder: Path, output: Path, fatal: int | None, report: Path | None = None) -> int:
    """Start one run in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        operations = Operations(output, fatal)
        if fatal is not None or report is not None:
            operations.watch()
        with (output.parent / f"{output.name}.log").open("a") as log:
            train(
                **SETTINGS, train=str(folder / "train.jsonl"), dev=str(folder / "dev.jsonl"), output_dir=str(output), resume=True,
                say=lambda text: log.write(text + "\n"),
            )  # fmt: skip
        if report is not None:
            report.write_text(json.dumps(operations.saves))
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def digest(file: Path) -> str:
    """A hash of the tensors' bits (safetensors' header comes in no fixed order)."""
    tensors = sorted(load_file(file).items())
    return hashlib.sha256(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in tensors)).hexdigest()


def outcome(output: Path, kills: int) -> dict:
    """What the finished run left."""
    left = [path.name for path in output.iterdir() if path.name.startswith(".")]
    state = json.loads((ckpt.checkpoints(output)[-1] / "trainer_state.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    files = {str(path.relative_to(output)) for path in output.rglob("*")}
    return {
        "weights": digest(output / "adapter" / "adapter.safetensors"),
        "last": digest(ckpt.checkpoints(output)[-1] / "adapter.safetensors"),
        "losses": losses,
        "kills": kills,
        "left": left,
        "pickles": [name for name in files if name.endswith((".pt", ".pth", ".bin", ".pkl"))],
    }


def run(folder: Path, number: int, kill: dict) -> dict:
    output = folder / f"run-{number}"
    kills = 0
    for seconds in kill.get("after_seconds", []):
        pid = child(folder, output, None)
        timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
        timer.start()
        _, status = os.waitpid(pid, 0)
        timer.cancel()
        kills += os.WIFSIGNALED(status)
        if not os.WIFSIGNALED(status) and status:
            return {"error": f"a run failed before it was killed; see {output}.log"}
    if "before_operation" in kill:
        _, status = os.waitpid(child(folder, output, kill["before_operation"]), 0)
        kills += os.WIFSIGNALED(status)
    _, status = os.waitpid(child(folder, output, None), 0)
    if status:
        return {"error": f"the resumed run failed; see {output}.log"}
    found = outcome(output, kills)
    shutil.rmtree(output)
    return found


def main(folder: Path, plan: list[dict]) -> list[dict]:
    torch.set_num_threads(1)
    rows(folder)
    return [run(folder, number, each) for number, each in enumerate(plan)]


def count_operations(folder: Path) -> dict:
    """How many file operations, and how many seconds, one whole run has."""
    torch.set_num_threads(1)
    rows(folder)
    started = time.monotonic()
    os.waitpid(child(folder, folder / "counted", None, folder / "count"), 0)
    return {"saves": json.loads((folder / "count").read_text()), "seconds": time.monotonic() - started}


if __name__ == "__main__":
    quiet()
    if sys.argv[2] == "count":
        print(json.dumps(count_operations(Path(sys.argv[1]))))
    else:
        print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
