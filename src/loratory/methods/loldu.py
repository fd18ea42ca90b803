"""LoLDU: the leading pivots of the weight's own LDU factorisation are trained."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loratory.methods.fields import Positive, PositiveInt
from loratory.methods.lora import scale
from loratory.methods.method import Declared, Method, frozen, new, trained
from loratory.ops.ldu import ldu
from loratory.sites.site import Site

KEPT = ("lu", "constant", "normal", "uniform")  # starts that leave the function as it is


@dataclass(frozen=True, kw_only=True)
class LoLDU(Method):
    """LoLDU: the leading pivots of the weight's own LDU factorisation are trained.

        y = W x + s L ((z - z0) * (U x))      W = P L' diag(D) U';  L: (out, rank), the first columns of P L'
        U: (rank, in), the first rows of U'   z, z0: (rank)   s = alpha / rank

    z starts at the pivots, z = z0 = D_r, so the model is unchanged; so it is with the starts constant (the mean of D_r), normal (its
    mean and deviation) and uniform (within half its mean), where z0 is what was drawn. With ones, zeros, standard-normal and
    standard-uniform z0 stays D_r, and the model starts changed. Trains rank numbers a layer, without weight decay.
    The leading pivots are not the largest, and L and U are not orthogonal.
    Raises ValueError if rank < 1 or rank > min(in, out), alpha <= 0.
    Source: arXiv 2410.13618 section 3. Differs: W stays whole and the update is the change of z, which is the same but for rounding;
    P is folded into L, and a pivot near zero counts as 1.
    """

    rank: PositiveInt | None = None  # >= 1; None: 768, capped at min(in, out)
    alpha: Positive = 1.0  # > 0
    start: Literal["lu", "constant", "normal", "uniform", "ones", "zeros", "standard-normal", "standard-uniform"] = (
        "lu"  # of z
    )
    basis: Literal["file", "weight"] = (
        "file"  # of L and U: in files, or made again from the base's weight when a file is loaded
    )

    default_rank = 768
    core_form = "diagonal"

    def init(self, site: Site) -> dict[str, Declared]:
        rank = site.rank(self.rank, self.default_rank)
        L, U = new(site, *site.stack, site.outputs, rank), new(site, *site.stack, rank, site.inputs)
        D = new(site, *site.stack, rank)
        if not L.is_meta:
            f = ldu(site.finite().to(L))
            L.copy_(f.PL[..., :rank])
            D.copy_(f.D[..., :rank])
            U.copy_(f.U[..., :rank, :])
        z = self._start(D, site.generator)
        made = self.basis == "weight"
        return {
            "L": frozen(L, rebuilt=made),
            "U": frozen(U, rebuilt=made),
            "z0": frozen((z if self.start in KEPT else D).clone()),
            "z": trained(z, decay=False),
        }

    def _start(self, D: Tensor, generator: torch.Generator | None) -> Tensor:
        mean = D.mean(-1, keepdim=True)
        drawn = torch.empty_like(D)
        match self.start:
            case "lu":
                return D.clone()
            case "constant":
                return mean.expand_as(D).clone()
            case "normal":
                deviation = D.std(-1, keepdim=True, correction=int(D.shape[-1] > 1))
                return drawn.normal_(generator=generator) * deviation + mean
            case "uniform":
                return drawn.uniform_(-0.5, 0.5, generator=generator) * mean.abs()
            case "ones":
                return drawn.fill_(1.0)
            case "zeros":
                return drawn.zero_()
            case "standard-normal":
                return drawn.normal_(generator=generator)
            case _:
                return drawn.uniform_(-1, 1, generator=generator)

    def factors(self, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        return t.L, scale(self.alpha, t.z.shape[-1], False) * (t.z - t.z0), t.U
