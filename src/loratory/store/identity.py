"""Which base an adapter belongs to: names and shapes of its parameters, and a few of its numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loratory.runtime.layer import BASE, COPIES, LAYER, copies_of, layers_of
from loratory.runtime.shards import class_name, reshard, whole
from loratory.runtime.state import is_adapted, state_of

_NUMBERS, _MOST, _LEAST = 4096, 8, 2  # sampled in all, and of one tensor


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's own parameters by name, whatever is merged or swapped in at the moment."""
    own = {
        name: p.detach()
        for name, p in model.named_parameters(remove_duplicate=False)
        if LAYER not in name.split(".") and COPIES not in name.split(".")
    }
    for owner, copies in copies_of(model).items():
        for leaf, p in copies[BASE].named_parameters():
            own[f"{owner}.{leaf}" if owner else leaf] = p.detach()
    for name, layer in layers_of(model).items():
        if layer.unmerged is not None:
            own[f"{name}.weight"] = layer.unmerged.reshape(-1)
    return own


def identity(
    model: nn.Module, replaced: list[str], state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """What is stored of the base. `replaced`: tensors that the adapter holds itself, whose base values do not matter.

    A tensor spread over processes is gathered for its sample, one at a time; with a state_dict it is looked up there.
    """
    tensors = base_tensors(model)
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    for name, layer in layers_of(model).items():
        if layer.unmerged is not None:
            shapes[f"{name}.weight"] = list(layer.site.weight.shape)
    config = getattr(model, "config", None)
    return {
        "class": class_name(model),
        "name": getattr(config, "_name_or_path", "") or "",
        "dtype": _dtype(tensors),
        "shapes": shapes,
        "sample": _sample({n: t for n, t in tensors.items() if n not in set(replaced)}, state_dict),
        "transforms": list(state_of(model).transforms) if is_adapted(model) else [],
    }


def check_identity(model: nn.Module, stored: dict[str, Any], replaced: list[str], *, other_precision: bool) -> None:
    """Refuse a base that is not the one the adapter was made for; another precision of it only where told.

    Raises ValueError naming the first parameter that differs, with both shapes.
    """
    reshard(model)
    tensors = base_tensors(model)
    found = {name: list(t.shape) for name, t in tensors.items()}
    wanted: dict[str, list[int]] = stored["shapes"]
    for name, shape in wanted.items():
        if name not in found:
            raise ValueError(
                f"the adapter was made for a {stored['class']} with a parameter '{name}' {tuple(shape)}, which this {type(model).__name__} "
                f"does not have; load the base it was made for{_called(stored)}"
            )
        if found[name] != shape:
            resized = len(shape) == 2 and found[name][1:] == shape[1:] and "embed" in name.lower()
            out = (
                f"the adapter was made after new tokens were added: call model.resize_token_embeddings({shape[0]}) first"
                if resized
                else f"load the base it was made for{_called(stored)}"
            )
            raise ValueError(
                f"layer '{name}' is {tuple(found[name])} here, but {tuple(shape)} in the adapter's base; {out}"
            )
    if extra := sorted(set(found) - set(wanted)):
        raise ValueError(
            f"this {type(model).__name__} has a parameter '{extra[0]}' {tuple(found[extra[0]])}, which the adapter's base ({stored['class']}) did not have; "
            f"load the base it was made for{_called(stored)}"
        )
    mine = list(state_of(model).transforms) if is_adapted(model) else []
    if stored.get("transforms", []) != mine:
        raise ValueError(
            f"the adapter's base was transformed by {stored['transforms'] or 'nothing'}, this one by {mine or 'nothing'}; apply the same transforms first"
        )
    differing = _first_difference(tensors, stored["sample"], replaced, exact=True)
    if differing is None:
        return
    close = _first_difference(tensors, stored["sample"], replaced, exact=False)
    if close is not None:
        raise ValueError(
            f"layer '{close}' holds other numbers than in the adapter's base (shapes agree): this is another model or another version of it; "
            f"load the base it was made for{_called(stored)}"
            + (
                ". If tokens were added, their rows start at random: train them with also_train= so that the adapter holds them"
                if "embed" in close
                else ""
            )
        )
    if not other_precision and stored["dtype"] == _dtype(tensors):
        raise ValueError(
            f"layer '{differing}' holds slightly other numbers than in the adapter's base, though both are {stored['dtype']}: this is another version "
            "of it (rounded on the way, or with other random rows for new tokens); load the base it was made for"
            f"{_called(stored)}, or pass other_precision=True to accept this one"
        )
    if not other_precision:
        raise ValueError(
            f"layer '{differing}' differs from the adapter's base by rounding: the base was {stored['dtype']}, this one is {_dtype(tensors)}; "
            f"load it in {stored['dtype']}, or pass other_precision=True to accept it"
        )


def _sample(tensors: dict[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor] | None) -> dict[str, list[float]]:
    """A few numbers of every tensor: one that differs is enough to make another base."""
    named = {n: t for n, t in tensors.items() if t.is_floating_point() and t.numel() and t.device.type != "meta"}
    count = max(_LEAST, min(_MOST, _NUMBERS // max(1, len(named))))
    return {name: _numbers(whole(t, name, state_dict), count) for name, t in named.items()}


def _numbers(t: torch.Tensor, count: int) -> list[float]:
    flat = t.reshape(-1)
    at = torch.linspace(0, flat.numel() - 1, min(count, flat.numel()), dtype=torch.float64).long()
    return [float(v) for v in flat[at.to(flat.device)].double()]


def _first_difference(
    tensors: dict[str, torch.Tensor], sample: dict[str, list[float]], replaced: list[str], *, exact: bool
) -> str | None:
    for name, wanted in sample.items():
        if name in replaced or tensors[name].device.type == "meta":
            continue
        found = _numbers(whole(tensors[name], name), len(wanted))
        near = 0.02 * max(map(abs, wanted), default=0.0)  # bfloat16 and 8-bit rounding lie well inside
        if any(a != b if exact else not abs(a - b) <= near for a, b in zip(found, wanted, strict=True)):
            return name
    return None


def _dtype(tensors: dict[str, torch.Tensor]) -> str:
    return str(next((t.dtype for t in tensors.values() if t.is_floating_point()), "none")).removeprefix("torch.")


def _called(stored: dict[str, Any]) -> str:
    return f" ('{stored['name']}')" if stored.get("name") else ""
