"""RandLoRA: a full-rank update from frozen random bases with trained scales."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loratory.methods.fields import Positive, PositiveInt, Share
from loratory.methods.method import Declared, Footprint, Method, check_linear, frozen, new, trained
from loratory.ops.scaled_basis import scaled_basis
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class RandLoRA(Method):
    """RandLoRA: a full-rank update from frozen random bases that all layers share, with trained scales.

        y = W x + D dropout(x),   D = s sum_j U_j diag(lam[:, j]) V diag(gamma[j, :]), or its transpose where in > out
        V = PA[:, 0, :d]   U_j = PB[:D, j, :]   lam: (rank, n)   gamma: (n, d);   d, D = min, max of in and out, n = ceil(d / rank)
        s = (alpha / rank) / sqrt(n), or without the root:  scaling

    lam starts at 0 and gamma at 1 / max(n, d), so the model is unchanged. A smaller rank means more trained numbers. Trains
    ceil(min(in, out) / rank) (rank + min(in, out)) numbers a layer. PA and PB follow from the seed, so files hold a checksum of them.
    Raises ValueError if rank < 1, alpha <= 0, dropout outside [0, 1), or a layer is not linear.
    Source: arXiv 2502.00987 eq. 4. Differs: the released codes pair row and column blocks in another order (`order="released"`), and
    PEFT leaves out 1/sqrt(n) (`scaling="rank"`); bases are drawn in float32, by each adapter for itself.
    """

    rank: PositiveInt | None = None  # >= 1: of each basis; None: 32
    alpha: Positive | None = None  # > 0; None: twice the rank
    dropout: Share = 0.0  # in [0, 1)
    bases: Literal["dense", "sparse", "very-sparse"] = (
        "dense"  # sparse: -1, 0, 1 with 1/6, 2/3, 1/6; very: 1/(2 sqrt(d))
    )
    order: Literal["paper", "released"] = "paper"  # released: as PEFT and the authors' code, for their checkpoints
    scaling: Literal["rank-root", "rank"] = "rank-root"  # with 1/sqrt(n), as the authors' code, or without it, as PEFT
    seed: int = 0  # of the bases

    full_rank: ClassVar[bool] = True
    default_rank: ClassVar[int] = 32  # of each basis

    def shared(self, sites: Mapping[str, Site]) -> dict[str, Declared]:
        for site in sites.values():
            check_linear(self, site)
        first = next(iter(sites.values()))
        most = max(site.outputs for site in sites.values()), max(site.inputs for site in sites.values())
        r, d, D = self.rank or self.default_rank, min(most), max(most)
        generator = torch.Generator().manual_seed(self.seed)
        pools = {}
        for name, shape in (("PA", (r, 1, d)), ("PB", (D, math.ceil(d / r), r))):
            pool = new(first, *shape)
            if not pool.is_meta:
                pool.copy_(self._drawn(shape, d, generator))
            pools[name] = frozen(pool, rebuilt=True)
        return pools

    def _drawn(self, shape: tuple[int, ...], d: int, generator: torch.Generator) -> Tensor:
        """Random numbers of deviation 1, on the CPU: the same on every machine."""
        drawn = torch.rand(shape, generator=generator, dtype=torch.float32)
        if self.bases == "dense":
            drawn = 2 * drawn - 1
        else:
            share = 1 / (2 * (3 if self.bases == "sparse" else math.sqrt(d)))
            drawn = (drawn > 1 - share).float() - (drawn < share).float()
        deviation = float(drawn.double().std())
        return (
            drawn / float(f"{deviation:.7g}") if deviation > 0 else drawn
        )  # rounded: sums differ by machine in the last bits

    def init(self, site: Site) -> dict[str, Declared]:
        r, d = self.rank or self.default_rank, min(site.inputs, site.outputs)
        n = math.ceil(d / r)
        lam, gamma = new(site, *site.stack, r, n).zero_(), new(site, *site.stack, n, d).fill_(1 / max(n, d))
        return {"lam": trained(lam), "gamma": trained(gamma)}

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        d, D = min(outputs, inputs), max(outputs, inputs)
        r = self.rank or self.default_rank
        columns = math.ceil(d / r) * r
        return Footprint(columns + (2 * inputs if self.dropout else 0), scratch=columns * (3 * d + D))

    def factors(self, t: Any) -> tuple[Tensor, Tensor]:
        *stack, r, n = t.lam.shape
        out, inputs = t.shape[-2:]
        d, D = min(out, inputs), max(out, inputs)
        s = (2.0 if self.alpha is None else self.alpha / r) / (math.sqrt(n) if self.scaling == "rank-root" else 1.0)
        G = scaled_basis(t.PA[:, 0, :d], t.lam, t.gamma)  # (*stack, n, r, d)
        if self.order == "released":
            G = G.transpose(-3, -2)
        right = s * G.reshape(*stack, n * r, d)
        left = t.PB[:D, :n].reshape(D, n * r).expand(*stack, D, n * r)
        return (left, right) if inputs <= out else (right.mT, left.mT)
