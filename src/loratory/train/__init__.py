"""Training, on transformers' Trainer. Python's way in: `train(base=..., train=..., ...)`."""

from typing import Any

from loratory.train.settings import TrainSettings, read_settings

__all__ = ["Result", "TrainSettings", "read_settings", "train"]


def __getattr__(name: str) -> Any:  # the run needs transformers, the settings do not
    if name in ("Result", "train"):
        from loratory.train import run

        return getattr(run, name)
    raise AttributeError(f"module 'loratory.train' has no attribute '{name}'")
