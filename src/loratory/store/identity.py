"""Which base an adapter belongs to: names and shapes of its parameters, and a few of its numbers."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from loratory.runtime.layer import BASE, copies_of, is_ours, layers_of
from loratory.runtime.shards import class_name, reshard, whole, whole_shape
from loratory.runtime.state import transforms_of
from loratory.sites import Site
from loratory.sites.quantized import quantized_sites

_NUMBERS, _MOST, _LEAST = 4096, 8, 2  # sampled in all, and of one tensor


class BaseTensor(NamedTuple):
    """A tensor of the base. A quantised weight is read when its numbers are asked for, and not kept."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    quantized: bool = False
    drifts: bool = False  # its numbers may differ by rounding in the same base


def base_tensors(model: nn.Module) -> dict[str, BaseTensor]:
    """The base's own parameters by name, whatever is merged or swapped in at the moment; quantised layers as one weight each."""
    quantized = quantized_sites(model)
    own: dict[str, BaseTensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        if is_ours(name):
            continue
        if owner in quantized and leaf != "bias":
            site = quantized[owner]
            shape = site.shape[::-1] if site.one_hot else site.shape
            own[f"{owner}.weight"] = BaseTensor(shape, partial(_read, site, site.read), True, site.drifts)
        else:
            own[name] = BaseTensor(whole_shape(p), partial(_itself, p))
    for owner, copies in copies_of(model).items():
        for leaf, p in copies[BASE].named_parameters():
            own[f"{owner}.{leaf}" if owner else leaf] = BaseTensor(whole_shape(p), partial(_itself, p))
    for layer in layers_of(model).values():
        if layer.unmerged is not None:
            key = layer.site.weight_name
            before = own[key]
            own[key] = before._replace(read=partial(_read, layer.site, layer.base))
    return own


def _itself(t: torch.Tensor) -> torch.Tensor:
    return t  # not detached: ZeRO-3 gathers a parameter by what it wrote on it


def _read(site: Site, weight: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A layer's weight in the order it is stored in."""
    W = weight().detach()
    if site.rounds:  # has no stored matrix of its own
        return W.t() if site.one_hot else W
    return site.stored(W)


def identity(
    model: nn.Module, replaced: list[str], state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """What is stored of the base. `replaced`: tensors that the adapter holds itself, whose base values do not matter.

    A tensor spread over processes is gathered for its sample, one at a time; with a state_dict it is looked up there.
    """
    tensors = base_tensors(model)
    config = getattr(model, "config", None)
    return {
        "class": class_name(model),
        "name": getattr(config, "_name_or_path", "") or "",
        "dtype": _dtype(tensors),
        "shapes": {name: list(t.shape) for name, t in tensors.items()},
        "sample": _sample({n: t for n, t in tensors.items() if n not in set(replaced)}, state_dict),
        "transforms": list(transforms_of(model)),
        "quantized": [name for name, t in tensors.items() if t.quantized],
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
    mine, theirs = transforms_of(model), stored.get("transforms", [])
    if other_precision:
        mine, theirs = _not_precision(mine), _not_precision(theirs)
    if theirs != mine:
        way = (
            ""
            if _not_precision(theirs) != _not_precision(mine)
            else ", or pass other_precision=True to accept this one"
        )
        raise ValueError(
            f"the adapter's base was transformed by {', '.join(theirs) or 'nothing'}, this one by {', '.join(mine) or 'nothing'}; "
            f"apply the same transforms first{way}"
        )
    differing = _first_difference(tensors, stored["sample"], replaced, exact=True)
    if differing is None:
        return
    rounded = {*stored.get("quantized", ()), *(name for name, t in tensors.items() if t.quantized)}
    close = _first_difference(tensors, stored["sample"], {*replaced, *rounded}, exact=False)
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
    if not other_precision and differing in rounded:
        raise ValueError(
            f"layer '{differing}' holds other numbers than in the adapter's base: it {'was' if differing in stored.get('quantized', ()) else 'was not'} "
            f"quantised there and {'is' if tensors[differing].quantized else 'is not'} here, or in another way; load the base it was made for"
            f"{_called(stored)}, or pass other_precision=True to accept this one"
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


def _sample(tensors: dict[str, BaseTensor], state_dict: Mapping[str, torch.Tensor] | None) -> dict[str, list[float]]:
    """A few numbers of every tensor: one that differs is enough to make another base."""
    count = max(_LEAST, min(_MOST, _NUMBERS // max(1, len(tensors))))
    found = {name: _numbers(whole(t.read(), name, state_dict), count) for name, t in tensors.items()}
    return {name: numbers for name, numbers in found.items() if numbers}


def _numbers(t: torch.Tensor, count: int) -> list[float]:
    """Numbers at equal distances; none where the tensor has no real ones."""
    if not t.is_floating_point() or not t.numel() or t.device.type == "meta":
        return []
    flat = t.reshape(-1)
    at = torch.linspace(0, flat.numel() - 1, min(count, flat.numel()), dtype=torch.float64).long()
    return [float(v) for v in flat[at.to(flat.device)].double()]


def _first_difference(
    tensors: dict[str, BaseTensor], sample: dict[str, list[float]], replaced: Iterable[str], *, exact: bool
) -> str | None:
    for name, wanted in sample.items():
        if name in replaced:
            continue
        found = _numbers(whole(tensors[name].read()), len(wanted))
        if not found:
            continue
        near = 0.02 * max(map(abs, wanted), default=0.0)  # bfloat16 and 8-bit rounding lie well inside
        if any(
            a != b if exact and not tensors[name].drifts else not abs(a - b) <= near
            for a, b in zip(found, wanted, strict=True)
        ):
            return name
    return None


def _not_precision(transforms: list[str]) -> list[str]:
    return [t for t in transforms if not t.startswith("quantize")]


def _dtype(tensors: dict[str, BaseTensor]) -> str:
    found = (t.read() for t in sorted(tensors.values(), key=lambda t: t.quantized))
    return str(next((t.dtype for t in found if t.is_floating_point()), "none")).removeprefix("torch.")


def _called(stored: dict[str, Any]) -> str:
    return f" ('{stored['name']}')" if stored.get("name") else ""
