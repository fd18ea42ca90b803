"""Fingerprints: what must be the same when a run is resumed."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

from loratory.runtime.shards import processes
from loratory.tasks import Encoded
from loratory.train.settings import OF_NO_CONSEQUENCE, TrainSettings

ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps")
ROWS_PER_STEP = "rows in a step (per_device_train_batch_size x gradient_accumulation_steps x processes)"


def significant(settings: TrainSettings) -> dict[str, Any]:
    """The settings on which the trained weights depend; how the rows of a step are spread over processes is not among them."""
    flat = {key: value for key, value in settings.flat().items() if key not in (*OF_NO_CONSEQUENCE, *ROWS)}
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * processes()
    return json.loads(json.dumps({**flat, ROWS_PER_STEP: rows}, default=str))


def data_print(encoded: Encoded) -> dict[str, Any]:
    """Rows and SHA-256 of what the model will see of a split."""
    digest = hashlib.sha256()
    for example in encoded.examples:
        digest.update(json.dumps(example, sort_keys=True, default=str).encode())
    return {"rows": encoded.rows, "sha256": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Versions of what the numbers come from."""
    import accelerate
    import torch
    import transformers

    import loratory

    packages = (loratory, torch, transformers, accelerate)
    return {"python": platform.python_version()} | {each.__name__: str(each.__version__) for each in packages}
