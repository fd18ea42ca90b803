"""Adapted bare parameters: reading one gives the adapted weight.

The owner's class becomes a generated subclass on which the parameter's name is a property. The parameter itself stays where it
is, so state-dict keys, loading and saving do not change, and W is never written. Inside the owner's forward a weight is
computed once, however often it is read; code outside it (MultiheadAttention reads its out_proj) computes it at each reading.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from loratory.methods.method import two_factors
from loratory.runtime.layer import LAYER, Layer, Parameters, is_swapped, restore_class, subclass, swap_class
from loratory.sites.parameter import ParameterSite

_KEPT = "_loratory_kept"  # weights already computed in the forward that is running


def base_weight(layer: Layer) -> Tensor:
    return layer.site.weight


def low_rank_weight(layer: Layer) -> Tensor:
    (t,) = layer.active
    B, A = two_factors(t.method.factors(t))
    return layer.site.plus(B, A)  # type: ignore[attr-defined]


def whole_weight(layer: Layer) -> Tensor:
    (t,) = layer.active
    site = layer.site
    return site.stored(t.method.weight(t, site.read())).to(site.dtype).contiguous()


def mixed_weight(layer: Layer) -> Tensor:
    site = layer.site
    W = site.read()
    W = W if W.dtype == torch.float64 else W.float()
    out = W
    for i, t in enumerate(layer.active):
        out = out + layer.mix[i].to(W.dtype) * (t.method.weight(t, W) - W)
    return site.stored(out).to(site.dtype).contiguous()


def seat(site: ParameterSite) -> Layer:
    """The layer of a bare parameter; made, and its owner's class changed, where there is none yet."""
    module, leaf = site.module, site.leaf
    if LAYER not in module._modules:
        module.add_module(LAYER, Layer(site) if site.is_whole else Parameters())
    own = module._modules[LAYER]
    if isinstance(own, Parameters):
        if leaf not in own._modules:
            own.add_module(leaf, Layer(site))
        own = own._modules[leaf]
    _swap(module)
    return own


def unseat(layer: Layer) -> None:
    """Take an empty layer out; an owner without any is of its own class again."""
    site: Any = layer.site
    module, own = site.module, site.module._modules[LAYER]
    if isinstance(own, Parameters):
        del own._modules[site.leaf]
    if own is layer or not own._modules:
        del module._modules[LAYER]
    _swap(module)


def _swap(module: nn.Module) -> None:
    """Give an owner the class that fits the layers it holds now."""
    if is_swapped(module) and "_loratory_reads" in type(module).__dict__:
        restore_class(module)
    own = module._modules.get(LAYER)
    if own is not None:
        cls: Any = type(module)
        site: Any = own.site if isinstance(own, Layer) else None
        swap_class(module, reading_class(cls, tuple(sorted(own._modules)) if site is None else (site.leaf,)))


@cache
def reading_class(cls: Any, leaves: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of an owner's class, with its name, on which these parameters are read adapted."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler joins equal products itself
            return cls.forward(self, *args, **kwargs)
        with _kept(self):
            return cls.forward(self, *args, **kwargs)

    body: dict[str, Any] = {leaf: property(_reader(leaf)) for leaf in leaves}
    return subclass(cls, body | {"forward": forward, "_loratory_reads": leaves}, reading_class, leaves)


def _reader(leaf: str) -> Any:
    def read(self: Any) -> Tensor:
        own = self._modules[LAYER]
        layer = own if isinstance(own, Layer) else own._modules[leaf]
        if torch.compiler.is_compiling():
            return _compute(layer)
        kept = self.__dict__.get(_KEPT)
        if kept is None:
            return _compute(layer)
        key = (leaf, torch.is_grad_enabled())
        if key not in kept:
            kept[key] = _compute(layer)
        return kept[key]

    return read


def _compute(layer: Layer) -> Tensor:
    try:
        device = layer.site.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return layer.route(layer)
        with torch.autocast(device, enabled=False):
            return layer.route(layer)
    except AttributeError as e:  # torch.nn.Module would take it for a missing property and give the base weight
        raise RuntimeError(f"layer '{layer.site.name}': the adapted weight cannot be computed: {e}") from e


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    before = module.__dict__.get(_KEPT)
    module.__dict__[_KEPT] = {}
    try:
        yield
    finally:
        if before is None:
            module.__dict__.pop(_KEPT, None)
        else:
            module.__dict__[_KEPT] = before
