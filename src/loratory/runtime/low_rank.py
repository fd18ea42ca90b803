"""Any adapter as plain low-rank factors, with the error stated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loratory.methods.method import two_factors
from loratory.ops.svd import balanced, norm_of_product, svd_of_product, truncated_svd
from loratory.runtime.layer import BASE, Adapter, Layer, copies_of, layers_of
from loratory.runtime.state import require_adapter
from loratory.sites import Site, find_site, is_supported


@dataclass(frozen=True)
class Approximation:
    """How far low-rank factors are from the update they stand for (Frobenius norms)."""

    what: str
    total: float  # over all layers: |error| / |update|
    layers: dict[str, float]  # the same of each layer
    ranks: dict[str, int]  # rank of each layer's factors

    @property
    def worst(self) -> str:
        """The layer with the largest error."""
        return max(self.layers, key=self.layers.__getitem__)

    def __str__(self) -> str:
        lowest, highest = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {lowest}" if lowest == highest else f"ranks {lowest} to {highest}"
        return (
            f"{self.what}: {len(self.layers)} layers of {ranks}, relative error {self.total:.3g} in total, "
            f"at most {self.layers[self.worst]:.3g} (layer '{self.worst}')"
        )


class Factors(NamedTuple):
    """B A of one layer, and how far it is from what it stands for."""

    B: Tensor
    A: Tensor
    error: float
    norm: float  # of what it stands for


class Nearest(NamedTuple):
    """An adapter as factors."""

    sites: dict[str, Site]
    factors: dict[str, Factors]
    taken: set[str]  # trained copies that are in the factors
    error: Approximation


def nearest_low_rank(model: nn.Module, name: str, rank: int | None) -> Nearest:
    """Factors B A of rank at most `rank` for each layer of an adapter, nearest to its update.

    The factors themselves where the method states some of that rank; otherwise a truncated SVD: of the product where there are
    factors, else of W' - W, one layer at a time. Of a whole model trained in full, each layer's weight. rank=None: factors as they are.
    Raises ValueError if there is no layer, or rank is None and a layer has no factors.
    """
    adaptation = require_adapter(model, name)
    sites: dict[str, Site] = {}
    factors: dict[str, Factors] = {}
    taken: set[str] = set()
    for layer_name, layer in layers_of(model).items():
        if name in layer:
            sites[layer_name] = layer.site
            factors[layer_name] = nearest_of(layer, layer[name], rank)  # type: ignore[arg-type]
    if adaptation.method.trains == "all":
        for owner, copies in copies_of(model).items():
            module = model.get_submodule(owner)
            if name in copies and is_supported(module) and hasattr(copies[name], "weight"):
                site = sites[owner] = find_site(owner, module)
                D = _matrix(site, copies[name].weight) - _matrix(site, copies[BASE].weight)  # type: ignore[arg-type]
                factors[owner] = truncated(D, _asked(owner, type(adaptation.method).__name__, rank))
                taken.add(f"{owner}.weight")
    if not factors:
        raise ValueError(
            f"adapter '{name}' ({type(adaptation.method).__name__}) changes no layer's weight by factors or as a whole model, so there is "
            "nothing that a LoRA could hold"
        )
    return Nearest(sites, factors, taken, approximation(f"adapter '{name}' as LoRA", factors))


def nearest_of(layer: Layer, t: Adapter, rank: int | None) -> Factors:
    """The nearest factors of one layer."""
    refuse_broken(layer, t)
    own = own_factors(t)
    if own is None:
        return truncated(update(layer, t), _asked(layer.site.name, type(t.method).__name__, rank))
    B, A = own
    if rank is None and t.method.full_rank:
        raise ValueError(
            f"layer '{layer.site.name}': {type(t.method).__name__}'s update has rank min(out, in), so it is no low-rank adapter; merge it "
            "instead, or say which rank its nearest one is to have"
        )
    if rank is None or A.shape[-2] <= rank:
        return Factors(B, A, 0.0, norm_of_product(B.double(), A.double()))
    return truncated_product(B, A, rank)


def refuse_broken(layer: Layer, t: Adapter) -> None:
    for name, tensor in t.every_tensor().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"layer '{layer.site.name}': tensor {name} of its adapter holds NaN or infinity; go back to the last good checkpoint"
            )


def own_factors(t: Adapter) -> tuple[Tensor, Tensor] | None:
    """(B, A) where the method states them."""
    if not t.method.states("factors"):
        return None
    B, A = two_factors(t.method.factors(t))
    return B.detach(), A.detach()


def update(layer: Layer, t: Adapter) -> Tensor:
    """W' - W of one layer, in float32 or wider."""
    if not t.method.mergeable:
        raise ValueError(
            f"layer '{layer.site.name}': {type(t.method).__name__} changes more than a weight, so it has no update that a matrix could hold; "
            "keep the adapter with loratory.save"
        )
    with torch.no_grad():
        if t.method.states("delta") or t.method.states("factors"):
            return t.method.delta(t)
        W = layer.base()
        W = W if W.dtype == torch.float64 else W.float()
        return t.method.weight(t, W) - W


def truncated(D: Tensor, rank: int) -> Factors:
    """The nearest factors of a matrix."""
    wide = D.double() if min(D.shape[-2:]) <= 512 else D
    B, A = balanced(*truncated_svd(wide, rank))
    return Factors(B.to(D), A.to(D), float((wide - B @ A).norm()), float(wide.norm()))


def truncated_product(B: Tensor, A: Tensor, rank: int) -> Factors:
    """The nearest factors of lower rank of a product, which is never built."""
    U, s, Vh = svd_of_product(B.double(), A.double())
    low_B, low_A = balanced(U[..., :rank], s[..., :rank], Vh[..., :rank, :])
    return Factors(low_B.to(B), low_A.to(A), float(s[..., rank:].norm()), float(s.norm()))


def approximation(what: str, factors: Mapping[str, Factors]) -> Approximation:
    """The errors of all layers."""
    square = sum(f.error**2 for f in factors.values()), sum(f.norm**2 for f in factors.values())
    return Approximation(
        what,
        _ratio(square[0] ** 0.5, square[1] ** 0.5),
        {layer: _ratio(f.error, f.norm) for layer, f in factors.items()},
        {layer: f.A.shape[-2] for layer, f in factors.items()},
    )


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm > 0 else (0.0 if error == 0 else float("inf"))


def _asked(layer: str, method: str, rank: int | None) -> int:
    if rank is None:
        raise ValueError(
            f"layer '{layer}': {method} has no low-rank form of its own; say which rank its nearest one is to have"
        )
    return rank


def _matrix(site: Site, weight: Tensor) -> Tensor:
    """A layer's weight as (*stack, out, in), for another tensor in its place."""
    read = site.as_matrix(weight).detach()
    return read if read.dtype == torch.float64 else read.float()
