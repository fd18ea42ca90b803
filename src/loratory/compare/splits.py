"""The rows of a comparison: the same for every run, and known by their fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from loratory.tasks.data import Data, read_data
from loratory.train.settings import TrainSettings

SHOWN = 200  # characters of a test row's input in a report


def read_splits(settings: TrainSettings) -> Data:
    """Train, dev and test rows as the settings cut them. Raises ValueError without dev or test rows of their own."""
    data = read_data(settings.train, dev=settings.dev, test=settings.test, text_by=settings.text_by, seed=0)
    if any(note.startswith("dev: ") for note in data.notes):
        raise ValueError(
            f"'{settings.train}' has no dev rows, and held-out ones would be others for each seed; give them with --dev"
        )
    if not data.test:
        raise ValueError(f"'{settings.train}' has no test rows to report on; give them with --test")
    return replace(
        data,
        train=data.train[: settings.train_rows],
        dev=data.dev[: settings.dev_rows],
        test=data.test[: settings.test_rows],
    )


def fingerprint(data: Data) -> str:
    """SHA-256 of all rows."""
    digest = hashlib.sha256()
    for split in (data.train, data.dev, data.test):
        digest.update(b"split")
        for row in split:
            digest.update(json.dumps(row, sort_keys=True, default=content).encode())
    return digest.hexdigest()


def content(value: Any) -> str:
    """What stands for a value that JSON does not know: a digest of its bytes."""
    raw = (
        value.tobytes()
        if hasattr(value, "tobytes")
        else bytes(value)
        if isinstance(value, bytes)
        else repr(value).encode()
    )
    return hashlib.sha256(raw).hexdigest()


def text_of(row: Any) -> str:
    """A test row's input, shortened: its texts without what it asks for."""
    parts = []
    for key, value in row.items():
        if key in (
            "label",
            "labels",
            "tags",
            "ner_tags",
            "completion",
            "output",
            "answer",
            "ref",
            "refs",
            "references",
            "target",
        ):
            continue
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, list) and all(isinstance(word, str) for word in value):
            parts.append(" ".join(value))
        elif isinstance(value, list):
            parts += [str(turn.get("content", turn.get("value", ""))) for turn in value[:-1] if isinstance(turn, dict)]
    text = " / ".join(part for part in parts if part)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
