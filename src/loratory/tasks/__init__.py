"""Tasks: what a model is trained to do. One file a task; TASKS is the whole list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from loratory.tasks.chat import Chat
from loratory.tasks.classification import Classification
from loratory.tasks.image import Image
from loratory.tasks.seq2seq import Seq2Seq
from loratory.tasks.tagging import Tagging
from loratory.tasks.task import Encoded, PadBatch, Preview, Task
from loratory.tasks.text import Text

__all__ = ["TASKS", "Encoded", "PadBatch", "Preview", "Task", "make_task"]

TASKS: Mapping[str, type[Task]] = {
    "chat": Chat,
    "classification": Classification,
    "image": Image,
    "seq2seq": Seq2Seq,
    "tagging": Tagging,
    "text": Text,
}


def make_task(name: str, **settings: Any) -> Task:
    """The named task with these settings. Raises ValueError for a name or setting that does not exist."""
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=3, cutoff=0.0)
        raise ValueError(f"task '{name}' is unknown; nearest: {', '.join(near)} (all: {', '.join(TASKS)})")
    known = [field.name for field in fields(TASKS[name])]
    for key in settings:
        if key not in known:
            raise ValueError(f"task '{name}' has no setting '{key}'; it has: {', '.join(known)}")
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
    }
    return TASKS[name](**values)
