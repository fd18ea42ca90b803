"""A method's penalty is part of the training loss, once a step."""

import json
from typing import Any

import pytest

import loratory as lt
from loratory.train.opened import open_adapter
from loratory.train.run import train


def first_loss(keys: Any, folder: Any, **more: Any) -> float:
    settings = {"method": "salt", "rank": 2, "start": "normal", "max_steps": 1, "logging_steps": 1, "warmup_steps": 0.0}
    train(say=lambda line: None, **keys(**(settings | more)))
    history = json.loads((folder / "result.json").read_text())["history"]
    return next(line["loss"] for line in history if "loss" in line)


@pytest.mark.parametrize("pieces", [1, 2])
def test_once_a_step(keys, tmp_path, pieces):
    sizes = {"per_device_train_batch_size": 4 // pieces, "gradient_accumulation_steps": pieces, "learning_rate": 1e-9}
    without = first_loss(keys, tmp_path / "out", regularizer=0.0, **sizes)
    with_it = first_loss(keys, tmp_path / "out", regularizer=0.5, overwrite=True, **sizes)
    added = lt.penalty(open_adapter(tmp_path / "out").model).item()
    assert added > 1e-3
    assert with_it - without == pytest.approx(added, rel=1e-3)
