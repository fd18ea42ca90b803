"""Quantising a frozen base, layer by layer: `quantize`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from loratory.runtime.layer import has_patched_forward
from loratory.runtime.state import is_adapted, transforms_of
from loratory.runtime.ties import tied_places
from loratory.runtime.where import Where, select
from loratory.sites.packed import QUANTISERS, PackedLinear, pack_linear
from loratory.sites.quantized import quantized_site_class


def quantize(
    model: nn.Module,
    packing: str = "nf4",
    where: Where = "all-linear",
    *,
    exclude: Where | None = None,
    blocks: int | Iterable[int] | None = None,
) -> None:
    """Store the weights of chosen torch.nn.Linear layers in 4 or 8 bits, in place; biases and other layers stay as they are.

    nf4: 16 values at quantiles of a normal distribution, a scale for 64 numbers, the scales in int8 (QLoRA, arXiv 2305.14314,
    section 3: NF4 with double quantisation; differs: the scales' second level is int8 about the mean of 256, not float8).
    4.13 bits a number, about 9 % error on normal weights. int8: a scale for 128 numbers, 8.25 bits, about 0.6 %.
    where, exclude, blocks: as in `adapt`. Every layer is packed and its full weight dropped before the next. Done before adapters
    are attached; what was done is part of the base's identity in adapter files.
    Raises ValueError for an unknown packing, a weight that is shared, not finite or has no data; TypeError for a layer that is
    no Linear or quantised already; RuntimeError on an adapted model. Then nothing was changed.
    """
    if packing not in QUANTISERS:
        raise ValueError(f"packing is {packing!r}; it must be one of {', '.join(QUANTISERS)}")
    if is_adapted(model):
        raise RuntimeError("the model has adapters already; quantise the base first (loratory.detach), then adapt it")
    layers = select(model, where, exclude=exclude, blocks=blocks)
    if bare := next((name for name, layer in layers.items() if not isinstance(layer, nn.Module)), None):
        raise TypeError(
            f"layer '{bare}' is a bare parameter; only torch.nn.Linear can be quantised: leave it out with exclude="
        )
    shared = {name: names for names in tied_places(model).values() for name in names}
    for name, layer in layers.items():
        _check(name, layer, shared.get(f"{name}.weight", []))
    names = list(layers)
    del layers, layer
    for name in names:
        parent, _, leaf = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, leaf, _packed(owner.get_submodule(leaf), packing))
    transforms_of(model).append(f"quantize {packing} ({len(names)} layers)")


def _packed(layer: nn.Module, packing: str) -> PackedLinear:
    assert isinstance(layer, nn.Linear)
    return pack_linear(layer, packing)


def _check(name: str, layer: Any, shared: list[str]) -> None:
    if quantized_site_class(layer) is not None:
        raise TypeError(f"layer '{name}' ({type(layer).__name__}) is quantised already; leave it out with exclude=")
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            f"layer '{name}' is a {type(layer).__name__}; only torch.nn.Linear can be quantised: leave it out with exclude="
        )
    if (
        type(layer).forward is not nn.Linear.forward
        or has_patched_forward(layer)
        or hasattr(layer, "_hf_hook")
        or layer._forward_pre_hooks
        or layer._forward_hooks
    ):
        raise TypeError(
            f"layer '{name}' ({type(layer).__name__}) has a forward or hooks of its own, which a quantised layer would lose; "
            "leave it out with exclude=, or quantise before they are set"
        )
    if shared:
        other = next(n for n in shared if n != f"{name}.weight")
        raise ValueError(
            f"layer '{name}' shares its weight with '{other}', so quantising it would part them; leave it out with exclude="
        )
    if layer.weight.device.type == "meta":
        raise ValueError(f"layer '{name}' has no data (meta device); load its weights before quantising")
    if not bool(torch.isfinite(layer.weight).all()):
        raise ValueError(f"layer '{name}' holds NaN or infinity, which no scale can hold; load the base again")
