"""Checkpoints without pickle: `checkpoint-<step>/` holds the adapter, optimizer, scheduler, generators and trainer state.

    adapter.json, adapter.safetensors    the adapter, as `lt.save` writes it
    state.safetensors                    optimizer tensors by the trained tensors' names, whole also where processes share them;
                                         states of torch's and numpy's generators, of every process
    state.json                           everything of them that is no tensor; fingerprints; size of each file
    trainer_state.json                   transformers' own (step, epoch, log history, best metric)

A checkpoint is written beside its place, synced, and renamed, so a folder with that name is always whole.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratory.runtime.shards import processes, spread_like, whole

FORMAT = 1
STATE, TENSORS, TRAINER_STATE = "state.json", "state.safetensors", "trainer_state.json"
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


# -- which checkpoints there are ---------------------------------------------------------------------------------------


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders in output_dir, oldest first."""
    found = []
    folder = Path(output_dir)
    for path in folder.iterdir() if folder.is_dir() else ():
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint, after checking that all of it is there; None if there is none."""
    found = checkpoints(output_dir)
    if not found:
        return None
    check(found[-1])
    return found[-1]


def check(folder: Path) -> None:
    """Raises ValueError if the checkpoint is not ours, holds a pickle, or a file of it is missing or cut."""
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLES]
    if pickles:
        raise ValueError(
            f"{folder} holds {pickles[0]}, a pickle: it can run any code when it is read, so it is refused; resume it with the "
            "program that wrote it, or start anew in another output_dir"
        )
    if not (folder / STATE).is_file():
        raise ValueError(
            f"{folder} has no {STATE}, so it is no checkpoint of loratory; start anew in another output_dir"
        )
    try:
        sizes = json.loads((folder / STATE).read_text())["files"]
    except (ValueError, KeyError) as e:
        raise ValueError(
            f"{folder / STATE} cannot be read ({e}); delete {folder} to go on from the checkpoint before it"
        ) from e
    for name, size in sizes.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"{folder}: {name} {state}; delete the folder to go on from the checkpoint before it")


def discard(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between never leaves half of it under its name."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def rotate(output_dir: str | Path, limit: int | None, keep: Path | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; never the newest, never `keep` (the best)."""
    if limit is None or limit < 1:
        return
    found = checkpoints(output_dir)
    spare = [path for path in found[:-1] if keep is None or path.name != keep.name]
    for path in spare[: max(0, len(found) - max(limit, len(found) - len(spare)))]:
        discard(path)


# -- the state of a run ------------------------------------------------------------------------------------------------


def write_state(
    folder: Path | None,
    *,
    optimizer: Any,
    scheduler: Any,
    names: Mapping[int, str],
    scaler: Any = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write state.safetensors and state.json into a folder that holds the checkpoint's other files already.

    With several processes every one calls this, because the state is gathered; one without a folder writes nothing.
    """
    from safetensors.torch import save_file

    tensors, record = optimizer_state(optimizer, names)
    generators, others = all_generators()
    if folder is None:
        return
    save_file(tensors | generators, folder / TENSORS)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    state = {
        "format": FORMAT,
        "optimizer": record,
        "scheduler": scheduler_state(scheduler),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "generators": others,
        "files": sizes,
        **(more or {}),
    }
    (folder / STATE).write_text(json.dumps(state, indent=1))


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(state.json, state.safetensors) of a checkpoint."""
    from safetensors.torch import load_file

    state = json.loads((folder / STATE).read_text())
    if state["format"] > FORMAT:
        raise ValueError(f"{folder} has format {state['format']}, this version reads up to {FORMAT}; update loratory")
    return state, load_file(folder / TENSORS)


def optimizer_state(optimizer: Any, names: Mapping[int, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors under the trained tensors' names, and what is no tensor as JSON values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = whole(value).clone().contiguous().cpu()
            else:
                values.setdefault(name, {})[key] = json_value(value, optimizer)
    groups = [
        {key: json_value(value, optimizer) for key, value in group.items() if key != "params"}
        | {"params": [names[id(p)] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    return tensors, {"class": type(inner(optimizer)).__name__, "groups": groups, "values": values}


def restore_optimizer(
    optimizer: Any, names: Mapping[int, str], record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Put a written state into an optimizer over the same trained tensors."""
    if record["class"] != type(inner(optimizer)).__name__:
        raise ValueError(
            f"the checkpoint's optimizer is {record['class']}, this run's is {type(inner(optimizer)).__name__}; give the same optim"
        )
    found = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    written = [group["params"] for group in record["groups"]]
    if found != written:
        raise ValueError("the checkpoint trains other tensors than this run; resume with the settings of the first run")
    index, state, groups = 0, {}, []
    per_name: dict[str, dict[str, Any]] = {}
    by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            name, _, field = key.removeprefix("optimizer.").rpartition(".")
            p = by_name[name]
            per_name.setdefault(name, {})[field] = spread_like(p, tensor) if tensor.shape == p.shape else tensor
    for now, then in zip(optimizer.param_groups, record["groups"], strict=True):
        numbers = list(range(index, index + len(then["params"])))
        index += len(numbers)
        for number, name in zip(numbers, then["params"], strict=True):
            if entry := per_name.get(name, {}) | record["values"].get(name, {}):
                state[number] = entry
        kept = {key: tuple(v) if isinstance(now.get(key), tuple) else v for key, v in then.items() if key != "params"}
        groups.append(kept | {"params": numbers})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def scheduler_state(scheduler: Any) -> dict[str, Any]:
    """A learning-rate scheduler's state as JSON values."""
    state = {k: v for k, v in scheduler.state_dict().items() if k not in ("lr_lambdas", "_get_lr_called_within_step")}
    return {key: json_value(value, scheduler) for key, value in state.items()}


def restore_scheduler(scheduler: Any, state: Mapping[str, Any]) -> None:
    """Put a written state into a scheduler of the same kind; its functions of the step stay its own."""
    own = scheduler.state_dict()
    scheduler.load_state_dict({**own, **state})


def generator_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of python's, numpy's and torch's generators: (tensors, the rest)."""
    import numpy as np

    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "generator.python": torch.tensor(words, dtype=torch.int64),
        "generator.numpy": torch.tensor(np.asarray(keys, dtype=np.int64)),
        "generator.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        for number, generator in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"generator.cuda.{number}"] = generator
    rest = {"python": [version, gauss], "numpy": [str(kind), int(position), int(has_gauss), float(cached)]}
    return tensors, rest


def all_generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`generator_state` of the main process, with those of the others under `process.N`."""
    tensors, rest = generator_state()
    if processes() == 1:
        return tensors, rest
    every: list[Any] = [None] * processes()
    torch.distributed.all_gather_object(every, (tensors, rest))
    tensors, rest = every[0]
    for number, (each, _) in enumerate(every[1:], start=1):
        tensors |= {f"process.{number}.{name}": tensor for name, tensor in each.items()}
    return tensors, {**rest, "others": [each for _, each in every[1:]]}


def restore_process(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Set this process's generators to what `all_generators` gave; a process that was not there then starts as the main one."""
    number = torch.distributed.get_rank() if processes() > 1 else 0
    prefix = f"process.{number}."
    if number and f"{prefix}generator.cpu" in tensors:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        rest = rest["others"][number - 1]
    restore_generators(tensors, rest)


def restore_generators(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Set the generators to a written state."""
    import numpy as np

    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["generator.python"].tolist()), gauss))
    kind, position, has_gauss, cached = rest["numpy"]
    np.random.set_state((kind, tensors["generator.numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["generator.cpu"])
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            if (state := tensors.get(f"generator.cuda.{number}")) is not None:
                torch.cuda.set_rng_state(state, number)


def inner(optimizer: Any) -> Any:
    """The optimizer itself, without accelerate around it."""
    return getattr(optimizer, "optimizer", optimizer)


def json_value(value: Any, owner: Any) -> Any:
    """A value that JSON gives back unchanged. Raises ValueError for any other."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [json_value(entry, owner) for entry in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: json_value(entry, owner) for key, entry in value.items()}
    raise ValueError(
        f"{type(inner(owner)).__name__} keeps a {type(value).__name__} in its state, which cannot be saved without pickle; "
        "choose another optim or lr_scheduler_type"
    )
