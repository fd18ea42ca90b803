"""Exact resume: whatever kills a run, the resumed one ends with the bits of an uninterrupted one."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("kill_runs.py")


def drive(folder: Path, plan: object) -> object:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argument = plan if isinstance(plan, str) else json.dumps(plan)
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder), argument], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check_equal(runs: list[dict]) -> None:
    whole = runs[0]
    assert whole["kills"] == 0
    assert len(whole["losses"]) == 12
    for number, each in enumerate(runs):
        assert "error" not in each, (number, each)
        assert each["weights"] == whole["weights"], number
        assert each["last"] == whole["last"], number
        assert each["losses"] == whole["losses"], number
        assert each["left"] == [], number
        assert each["pickles"] == [], number


def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    plan = [{}, {"before_operation": 40}, {"before_operation": 66}, {"after_seconds": [1.5]}]
    runs = drive(tmp_path, plan)
    check_equal(runs)
    assert runs[1]["kills"] == runs[2]["kills"] == 1


@pytest.mark.slow
def test_thirty_random_kills(tmp_path: Path) -> None:
    whole = drive(tmp_path, "count")["seconds"]
    draw = random.Random(0)
    plan = [{"after_seconds": [draw.uniform(0.1, 0.9) * whole for _ in range(2)]} for _ in range(28)]
    runs = drive(tmp_path, [{}, *plan])
    check_equal(runs)
    assert sum(each["kills"] for each in runs) >= 30, "too many kills came after the end of their run"


@pytest.mark.slow
def test_a_kill_before_every_file_operation_of_a_save(tmp_path: Path) -> None:
    saves = drive(tmp_path, "count")["saves"]
    assert len(saves) == 7  # six checkpoints and the final adapter
    # the first save, one that deletes an older checkpoint, and the final adapter
    operations = [*range(1, saves[0] + 1), *range(saves[1] + 1, saves[2] + 1), *range(saves[5] + 1, saves[6] + 1)]
    runs = drive(tmp_path, [{}, *({"before_operation": n} for n in operations)])
    check_equal(runs)
    assert all(each["kills"] == 1 for each in runs[1:])
    assert len(operations) > 30
