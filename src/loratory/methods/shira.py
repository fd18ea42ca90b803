"""SHiRA: a few entries of the weight are trained."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loratory.methods.fields import Count, Positive, PositiveInt, PositiveShare
from loratory.methods.method import Declared, Method, check_linear, frozen, new, trained
from loratory.sites.site import Site

SCORED = ("wm", "grad", "snip")
OF_MASKS = (  # fields that some masks alone use, with their defaults
    ("fraction", 0.01, ("rand", *SCORED)),
    ("rank", None, ("rand", *SCORED)),
    ("skip", 0, SCORED),
    ("accumulate", "signed", ("grad", "snip")),
    ("frequency", 100, ("struct",)),
    ("axis", "rows", ("struct",)),
    ("offset", 0, ("struct",)),
)


@dataclass(frozen=True, kw_only=True)
class SHiRA(Method):
    """SHiRA: a few entries of the weight are trained, at places chosen before training.

        y = (W + alpha S) x      S: (out, in), the K values v at the flat places i (ascending), else 0

        rand   K places without replacement                 wm     the K largest |W|
        grad   the K largest |G|                             snip   the K largest |W G|;  G: the loss's gradient of W over batches
        struct every `frequency`-th row from `offset` on (or column, with axis), and the main diagonal

    v starts at 0, so the model is unchanged. K is fraction * out * in of each matrix, or rank (in + out) where rank is given; struct
    trains what its rows and the diagonal hold. Trains K numbers a layer. The update is sparse and of high rank; as a matrix it exists
    for a moment, in the forward pass and again in the backward pass (`cache_delta` keeps it). grad and snip need training batches:
    `adapt(..., seen=loratory.collect(model, batches))`, with what="absolute_gradient" for accumulate="abs". `skip` leaves out the best
    skip * K places: adapters that do not overlap. `loratory.switch` writes the K numbers into W itself and takes them out again bit for bit;
    `loratory.orthogonality` measures how much two adapters disturb each other.
    Raises ValueError if K < 1 or K > out * in, fraction outside (0, 1], nothing was collected for grad and snip, or the layer is not
    linear.
    Source: arXiv 2406.13175 sections 3 and 4. Differs: K is exact with rand (the paper draws each place by itself); equal scores go by
    place; the paper does not say how gradients are summed: signed, or their sizes, over all batches.
    """

    mask: Literal["rand", "wm", "grad", "snip", "struct"] = "rand"
    fraction: PositiveShare = 0.01  # in (0, 1]
    rank: PositiveInt | None = None  # >= 1: K = rank (in + out), in place of fraction
    frequency: PositiveInt = 100  # struct: >= 1
    axis: Literal["rows", "columns"] = "rows"  # struct
    offset: Count = 0  # struct: the first row or column
    accumulate: Literal["signed", "abs"] = "signed"  # grad, snip: G sums gradients of batches, or their sizes
    skip: Count = 0  # wm, grad, snip: >= 0
    alpha: Positive = 1.0  # > 0; at inference it weighs the adapter
    cache_delta: bool = False  # keep the update for the backward pass instead of making it again

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, default, masks in OF_MASKS:
            if getattr(self, field) != default and self.mask not in masks:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}, but mask {self.mask!r} does not use it; leave it out, or take mask {' or '.join(masks)}"
                )

    @property
    def needs(self) -> frozenset[str]:
        if self.mask not in ("grad", "snip"):
            return frozenset()
        return frozenset({"gradient" if self.accumulate == "signed" else "absolute_gradient"})

    def init(self, site: Site) -> dict[str, Declared]:
        check_linear(self, site)
        places = self._struct(site) if self.mask == "struct" else self._chosen(site)
        if site.outputs * site.inputs < 1 << 31:
            places = places.int()
        v = new(site, *site.stack, places.shape[-1]).zero_()
        return {"places": frozen(places), "v": trained(v, decay=False)}

    def entries(self, t: Any) -> tuple[Tensor, Tensor]:
        return t.places.long(), self.alpha * t.v

    def delta(self, t: Any) -> Tensor:
        *stack, out, inputs = t.shape
        places, S = self.entries(t)
        return S.new_zeros(*stack, out * inputs).scatter(-1, places, S).view(t.shape)

    def _chosen(self, site: Site) -> Tensor:
        entries = site.outputs * site.inputs
        K = self.rank * (site.inputs + site.outputs) if self.rank else max(1, round(self.fraction * entries))
        if K * (1 + self.skip) > entries:
            asks = f"rank {self.rank} asks" if self.rank else f"skip {self.skip} asks"
            raise ValueError(
                f"layer '{site.name}': {asks} for {K * (1 + self.skip)} trainable entries but the layer has {entries}; lower it, or leave the "
                "layer out with exclude="
            )
        if site.device.type == "meta":
            return torch.empty(*site.stack, K, dtype=torch.int64, device="meta")
        if self.mask == "rand":
            drawn = torch.empty(*site.stack, entries, device=site.device).uniform_(generator=site.generator)
            return drawn.argsort(dim=-1, stable=True)[..., :K].sort(-1).values
        W = site.read().detach().to(new(site, 0))
        G = next((getattr(site.seen, what).to(W) for what in self.needs), W)
        score = (W * G if self.mask == "snip" else G).abs().flatten(-2)
        best = score.argsort(dim=-1, descending=True, stable=True)
        return best[..., K * self.skip : K * (1 + self.skip)].sort(-1).values

    def _struct(self, site: Site) -> Tensor:
        out, inputs = site.outputs, site.inputs
        sides = out if self.axis == "rows" else inputs
        if self.offset >= sides:
            raise ValueError(
                f"layer '{site.name}' has {sides} {self.axis}, so offset {self.offset} is too large; lower it"
            )
        mask = torch.zeros(out, inputs, dtype=torch.bool)
        (mask if self.axis == "rows" else mask.t())[self.offset :: self.frequency] = True
        mask.diagonal().fill_(True)
        places = mask.flatten().nonzero().flatten().to(site.device)
        return places.expand(*site.stack, -1).clone()
