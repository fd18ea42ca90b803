"""`loratory train` as a user starts it: a process of its own, signals, pipes and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STORIES = Path(__file__).parents[1] / "models" / "stories260k"
LORATORY = [sys.executable, "-m", "loratory"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    rows = [{"prompt": f"place {i}", "completion": "It is there. " * (1 + i % 3)} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "base": STORIES,
        "train": tmp_path / "train.jsonl",
        "rank": 2,
        "max_length": 48,
        "logging_steps": 1,
        "output_dir": tmp_path / "out",
    }
    return [
        *LORATORY,
        "train",
        *(word for key, value in flags.items() for word in (f"--{key}", str(value))),
        "--no-eval_before",
    ]


def test_interrupt_saves_and_the_printed_command_goes_on(command: list[str], tmp_path: Path) -> None:
    running = subprocess.Popen(
        [*command, "--num_train_epochs", "2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    assert running.stdout is not None
    lines = []
    for line in running.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            running.send_signal(signal.SIGINT)
            break
    rest, _ = running.communicate(timeout=120)
    assert running.returncode == 130, rest
    assert "finishing this step and saving" in rest
    assert "\x1b" not in rest  # plain lines in a pipe
    resume = rest.rsplit("go on with: loratory ", 1)[1].split("\n")[0].split()
    steps = [int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "out").glob("checkpoint-*")]
    assert max(steps) >= 3
    again = subprocess.run(
        [*LORATORY, *resume, "--max_minutes", "1e-9", "--json"], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert (result["stopped"], result["steps"]) == ("time", max(steps) + 1)
    assert "resuming from" in again.stderr


def test_a_mistake_ends_with_code_2_and_one_line(command: list[str]) -> None:
    done = subprocess.run([*command, "--rank", "nine"], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: rank is 'nine'; it must be a whole number or none (null)\n"
    assert done.stdout == ""


def test_a_terminal_gets_a_bar(command: list[str]) -> None:
    import pty

    master, slave = pty.openpty()
    running = subprocess.Popen(
        [*command, "--max_steps", "3"], stdout=slave, stderr=subprocess.STDOUT, env={**ENVIRONMENT, "TERM": "xterm"}
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            piece = os.read(master, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    assert running.wait(timeout=60) == 0
    assert b"training" in shown
    assert b"\x1b[" in shown
    assert b"3 steps in" in shown
