"""Opening an adapter of either format, from a folder or by its name on the hub."""

import os
from pathlib import Path

from torch import nn

from loratory.runtime.attachable import refuse_wrapped
from loratory.store.hub import NAME, fetch
from loratory.store.inspection import Inspection
from loratory.store.native import RECORD, inspect_native, load_native
from loratory.store.peft import inspect_peft, is_peft, load_peft
from loratory.store.pickles import refuse_pickles


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    trainable: bool = False,
    other_precision: bool = False,
) -> None:
    """Add the adapter of a folder (ours, or PEFT's) to its base and make it the active one.

    folder: a folder of this machine, or a name on the hub (`owner/name`, `owner/name@revision`) where there is no such folder.
    trainable=True to go on training it. other_precision=True accepts the same base in another precision.
    Raises FileNotFoundError, ValueError (damaged file, other base, missing or unexpected tensors), all before the model changes.
    """
    path = find_adapter(folder)
    if trainable:
        refuse_wrapped(model)
    if is_peft(path):
        load_peft(model, path, name=name, trainable=trainable)
    else:
        load_native(model, path, name=name, trainable=trainable, other_precision=other_precision)


def inspect(folder: str | os.PathLike[str]) -> Inspection:
    """What an adapter folder (ours or PEFT's, or a name on the hub) holds; its files are checked, its base is not needed."""
    path = find_adapter(folder)
    return inspect_peft(path) if is_peft(path) else inspect_native(path)


def find_adapter(folder: str | os.PathLike[str]) -> Path:
    """The folder that holds an adapter: the given one, its `adapter` folder (a training output), that of a name on the hub,
    or an error that says what is there."""
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"'{path}' is a file; give the folder that holds {RECORD}")
    for each in (path, path / "adapter"):
        if (each / RECORD).exists() or is_peft(each):
            return each
    if not path.exists():
        if isinstance(folder, str) and NAME.fullmatch(folder):
            return fetch(folder)
        raise FileNotFoundError(f"there is no folder '{path}'; give the folder that holds {RECORD}")
    there = sorted(p.name for p in path.iterdir())
    refuse_pickles(path)
    raise FileNotFoundError(f"'{path}' holds no adapter ({RECORD}); it holds: {', '.join(there[:5]) or 'nothing'}")
