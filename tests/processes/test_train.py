"""`loratory train` in two processes, as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loratory.train.run import train

from .launch import environment, launch
from .test_loops import difference

STORIES = Path(__file__).parents[1] / "models" / "stories260k"
FSDP = ("-m", "tests.processes.fsdp_on_cpu")
SHARDED = {"fsdp": "true", "fsdp_config": '{"version": 2}'}


@pytest.fixture
def flags(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a run of 8 steps over 13 rows, a number that two processes cannot share evenly; keywords change them."""
    for split, count in (("train", 13), ("dev", 3)):
        rows = [
            {"prompt": f"{split} place {i}, area {i % 3}", "completion": f"It is there. {'Yes. ' * (i % 3)}"}
            for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(output: str, **changes: Any) -> dict[str, Any]:
        usual = {
            "base": str(STORIES), "train": str(tmp_path / "train.jsonl"), "dev": str(tmp_path / "dev.jsonl"), "max_length": 64, "rank": 2,
            "where": "attention", "num_train_epochs": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "eval_steps": 2,
            "learning_rate": 3e-3, "adam_epsilon": 1e-5, "device": "cpu", "output_dir": str(tmp_path / output),
        }  # fmt: skip
        return {key: value for key, value in (usual | changes).items() if value is not None}

    return make


def words(settings: dict[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        yield from [f"--{key}"] if value is True else [f"--{key}", str(value)]


def in_two(settings: dict[str, Any], program: tuple[str, ...] = ("-m", "loratory")) -> str:
    """What the first of two processes printed; the second one must have been silent."""
    told, silent = launch(*program, "train", *words(settings))
    assert silent == ""
    return told


def figures(output: Path) -> list[float]:
    history = json.loads((output / "result.json").read_text())["history"]
    return [line[key] for line in history for key in ("loss", "eval_token_loss") if key in line]


def check_equal(one: Path, other: Path) -> None:
    mine, theirs = figures(one), figures(other)
    assert len(mine) == len(theirs) == 12  # 8 steps and 4 evaluations
    assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < 1e-5
    assert mine[-1] < 0.95 * mine[2]
    assert difference(one / "adapter", other / "adapter") < 1e-5
    records = [json.loads((each / "adapter" / "adapter.json").read_text()) for each in (one, other)]
    assert records[0]["base"] == records[1]["base"]
    assert records[0]["training"]["data"] == records[1]["training"]["data"]


def test_two_processes_train_what_one_trains_and_one_resumes_them(
    flags: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    train(**flags("one"), say=lambda text: None)
    short = flags("two", per_device_train_batch_size=2, max_minutes=1e-4)
    told = in_two(short)
    assert "4 batches an epoch on cpu in 2 processes" in told
    assert told.count("the first training example") == 1
    assert "stopped at step 1 of 8 (time)" in told
    state = json.loads((tmp_path / "two" / "checkpoint-1" / "state.json").read_text())
    assert len(state["generators"]["others"]) == 1
    with pytest.raises(
        ValueError, match=r"rows in a step \(.* x processes\) was 4, now 2; resume with what it was started with"
    ):
        train(**flags("two", per_device_train_batch_size=2, resume=True), say=lambda text: None)
    train(**flags("two", resume=True), say=lambda text: None)
    check_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"also_train": "model.norm,lm_head"}, {"method": "dora"}])
def test_fsdp2_trains_what_one_process_trains(
    more: dict[str, Any], flags: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    train(**flags("one", **more), say=lambda text: None)
    in_two(flags("sharded", per_device_train_batch_size=2, **SHARDED, **more), FSDP)
    check_equal(tmp_path / "one", tmp_path / "sharded")


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(flags: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """One step in one process, one sharded over two, one in DDP, the rest sharded again."""
    train(**flags("one"), say=lambda text: None)
    train(**flags("many", max_minutes=1e-4), say=lambda text: None)
    halves = flags("many", per_device_train_batch_size=2, resume=True)
    in_two({**halves, **SHARDED, "max_minutes": 1e-4}, FSDP)
    in_two({**halves, "max_minutes": 1e-4})
    told = in_two({**halves, **SHARDED}, FSDP)
    assert "resuming from" in told
    assert "checkpoint-3" in told
    check_equal(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
def test_resuming_in_the_same_processes_repeats_the_dropout(
    flags: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    halves = {"per_device_train_batch_size": 2, "dropout": 0.3}
    in_two(flags("whole", **halves))
    in_two(flags("cut", **halves, max_minutes=1e-4))
    in_two(flags("cut", **halves, resume=True))
    assert difference(tmp_path / "whole" / "adapter", tmp_path / "cut" / "adapter") == 0.0


@pytest.mark.slow
def test_classification_weighs_the_rows_of_all_processes(flags: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for split, count in (("train", 13), ("dev", 6)):
        rows = [{"text": f"{split} " + "x " * (1 + i % 4) + f"place {i}", "label": "abc"[i % 3]} for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(**flags("one", task="classification"), say=lambda text: None)
    in_two(flags("two", task="classification", per_device_train_batch_size=2))
    losses = [
        [
            line["loss"]
            for line in json.loads((tmp_path / each / "result.json").read_text())["history"]
            if "loss" in line
        ]
        for each in ("one", "two")
    ]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    assert difference(tmp_path / "one" / "adapter", tmp_path / "two" / "adapter") < 1e-5


@pytest.mark.slow
def test_torchrun_interrupted_saves_and_goes_on(flags: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = flags("out", per_device_train_batch_size=2, num_train_epochs=2000, eval_before=None)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "loratory",
        "train",
    ]
    running = subprocess.Popen(
        [*torchrun, *words(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    assert running.stdout is not None
    lines = []
    for line in running.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            os.kill(running.pid, signal.SIGINT)
            break
    rest, _ = running.communicate(timeout=120)
    assert "finishing this step and saving" in rest, "".join(lines) + rest
    steps = [int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "out").glob("checkpoint-*")]
    assert max(steps) >= 3
    told = in_two({**settings, "resume": True, "max_minutes": 1e-4})
    assert f"stopped at step {max(steps) + 1} of" in told


@pytest.mark.slow
def test_a_mistake_is_told_by_every_process_with_its_number(flags: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(AssertionError, match=r"process 0:\n\nerror: rank is 'nine'; it must be"):
        in_two(flags("out", rank="nine"))
