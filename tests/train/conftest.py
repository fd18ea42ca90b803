"""A run small enough for a second: stories260k on 13 rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STORIES = Path(__file__).parents[1] / "models" / "stories260k"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with train, dev and test rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, count in (("train", 13), ("dev", 3), ("test", 2)):
        rows = [
            {"prompt": f"{split} place {i}, area {i % 3}", "completion": f"It is there. {'Yes. ' * (i % 3)}"}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def keys(data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a short run; keywords change them."""

    def make(**changes: Any) -> dict[str, Any]:
        usual = {
            "base": str(STORIES), "train": str(data / "train.jsonl"), "dev": str(data / "dev.jsonl"), "output_dir": str(tmp_path / "out"),
            "max_length": 64, "rank": 2, "where": "attention", "max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1,
            "eval_steps": 2, "device": "cpu", "eval_before": False,
        }  # fmt: skip
        return {key: value for key, value in (usual | changes).items() if value is not None}

    return make
