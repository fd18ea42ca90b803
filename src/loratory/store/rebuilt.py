"""Tensors that a file does not hold: its method makes them again from a seed or the base's weights, and a checksum says whether they are the same."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratory.methods.method import Declared, Method
from loratory.runtime.attach import share
from loratory.sites import Site


def checksum(tensor: Tensor) -> str:
    """SHA-256 of shape, dtype and bits."""
    numbers = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(numbers.shape)} {numbers.dtype}".encode())
    digest.update(
        numbers.view(torch.uint8).numpy().data if numbers.dim() else numbers.reshape(1).view(torch.uint8).numpy().data
    )
    return digest.hexdigest()


def rebuild(
    method: Method,
    methods: Mapping[str, Method],
    sites: Mapping[str, Site],
    wanted: Mapping[str, list[str]],
    path: Path,
) -> dict[str, Tensor]:
    """The tensors of these names, made by the method. Raises ValueError where one is not what the adapter was trained with."""
    if not wanted:
        return {}
    found: dict[str, Tensor] = {}
    with torch.random.fork_rng():  # a start draws from the user's generator, too
        parts: dict[str, Mapping[str, Any]] = {"shared": share(method, methods, sites)}
        for layer in dict.fromkeys(
            key.removeprefix("layers/").rpartition("/")[0] for key in wanted if key.startswith("layers/")
        ):
            sites[layer].together = sites
            parts[f"layers/{layer}"] = methods[layer].init(sites[layer])
            sites[layer].together = {}
    for key, (told, dtype) in wanted.items():
        place, _, n = key.rpartition("/")
        declared = parts.get(place, {}).get(n)
        tensor = declared.tensor.to(getattr(torch, dtype)) if isinstance(declared, Declared) else None
        made = None if tensor is None else checksum(tensor)
        if tensor is None or made != told:
            raise ValueError(
                f"'{path}' holds the checksum of tensor '{key}' ({told[:12]}) in place of its numbers, but this machine makes others of "
                f"{_source(method)} ({'none' if made is None else made[:12]}); load it with the machine, torch and loratory that it was saved "
                "with (adapter.json has the versions), merge it there, load a file that holds the tensor itself, or train it again"
            )
        found[key] = tensor
    return found


def _source(method: Method) -> str:
    seed = getattr(method, "seed", None)
    return "the base's weight" if seed is None else f"seed {seed}"
