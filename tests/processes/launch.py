"""Starts programs as torchrun would, without its agent."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(paths),
        **more,
    }


def launch(*command: object, count: int = 2, timeout: float = 300) -> list[str]:
    """Run `python COMMAND` in so many processes that know of each other; what each printed. Fails if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [sys.executable, *map(str, command)]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    running = [
        subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(RANK=str(n), LOCAL_RANK=str(n), **world)
        )
        for n in range(count)
    ]  # fmt: skip
    try:
        done = [each.communicate(timeout=timeout) for each in running]
    finally:
        for each in running:
            each.kill()
    for number, (each, (out, errors)) in enumerate(zip(running, done, strict=True)):
        assert each.returncode == 0, f"process {number}:\n{out[-2000:]}\n{errors[-4000:]}"
    return [out for out, _ in done]
