"""MoS: low-rank factors assembled from shards of pools that all blocks share."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratory.methods.fields import Count, Positive, PositiveInt, Share
from loratory.methods.lora import scale
from loratory.methods.method import Declared, Footprint, Method, Shared, frozen, new, trained
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class MoS(Method):
    """MoS: low-rank factors assembled from shards of pools that all blocks share.

        y = W x + s B (A dropout(x)),   s = alpha / rank
        row j of A: PA[ia[j l]], ..., PA[ia[j l + l - 1]] side by side;   column j of B: the same of PB and ib
        PA: (e N l, in / l)   PB: (e N l, out / l)   ia, ib: (rank l) integers;  e: budget, l: shards, p: private, N: blocks

    Layers whose names differ in numbers only are the N blocks of one type, which has one pair of pools. The first (e - p) N l shards
    are open to every block, and each block draws (rank - p) l of them without repetition, for A and B apart; the last p l of its index
    are its own alone. PA starts uniform within 1/sqrt(in), PB at 0, so the model is unchanged. Trains budget * (in + out) numbers a
    layer: those of a LoRA of that rank, at the higher rank of the assembled factors.
    Raises ValueError if in or out is not divisible by shards, private > budget or > rank, the public pool is too small for the rank,
    budget = private with another rank, or layers of one type differ in shape.
    Source: arXiv 2410.00938 section 3. Differs: each pool is drawn once.
    """

    rank: PositiveInt | None = (
        None  # >= 1: of the assembled factors; None: 8, capped by the layer and by the public pool
    )
    budget: PositiveInt = 2  # >= 1: a LoRA of this rank has as many numbers
    private: Count = 1  # >= 0: ranks that no other block uses
    shards: PositiveInt = 2  # >= 1: pieces of each vector; 1: whole vectors
    alpha: Positive | None = None  # > 0; None: the scale s is 1
    dropout: Share = 0.0  # in [0, 1)
    paired: bool = False  # A and B draw the same shards (the paper's ablation)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.private > self.budget:
            raise ValueError(f"private is {self.private}; it must be at most budget ({self.budget})")

    def shared(self, sites: Mapping[str, Site]) -> dict[str, Declared]:
        pools: dict[str, Declared] = {}
        for kind, blocks in types(sites).items():
            first = blocks[0]
            for site in blocks:
                if site.shape != first.shape:
                    raise ValueError(
                        f"layer '{site.name}' is {site.shape} and '{first.name}' is {first.shape}, but MoS's layers of one type ({kind}) must "
                        "share one shape; adapt one of them by another adapter, or leave it out with exclude="
                    )
                for side, width in (("in", site.inputs), ("out", site.outputs)):
                    if width % self.shards:
                        raise ValueError(
                            f"layer '{site.name}' has {width} {side}puts, which is not divisible by shards={self.shards} of MoS; "
                            "lower shards, or leave the layer out with exclude="
                        )
            count = self.budget * len(blocks) * self.shards
            PA = new(first, *first.stack, count, first.inputs // self.shards)
            PB = new(first, *first.stack, count, first.outputs // self.shards)
            bound = first.inputs**-0.5
            if first.one_hot:
                PA.zero_(), PB.normal_(generator=first.generator)
            else:
                PA.uniform_(-bound, bound, generator=first.generator), PB.zero_()
            pools |= {f"{kind}-A": trained(PA), f"{kind}-B": trained(PB)}
        return pools

    def notes(self, sites: Mapping[str, Site]) -> list[str]:
        alone = [kind for kind, blocks in types(sites).items() if len(blocks) < 2]
        if not alone:
            return []
        note = f"MoS: {', '.join(alone)} is one block only, so nothing is shared there"
        warnings.warn(note, stacklevel=2)
        return [note]

    def init(self, site: Site) -> dict[str, Declared | Shared]:
        kind = type_of(site.name)
        blocks = types(site.together)[kind]
        block = next(i for i, each in enumerate(blocks) if each.name == site.name)
        public = (self.budget - self.private) * len(blocks)
        rank = site.rank(self.rank, default=min(8, public + self.private))
        if public == 0 and rank != self.budget:
            raise ValueError(
                f"layer '{site.name}': MoS has no public pool (private = budget = {self.budget}), so rank {rank} must equal budget"
            )
        if not self.private <= rank <= public + self.private:
            raise ValueError(
                f"layer '{site.name}': MoS's pool has {public} public ranks ({len(blocks)} blocks), the layer asks for "
                f"{rank - self.private}; raise budget, lower rank or private, or leave the layer out with exclude="
            )
        ia = self._index(site, rank, block, public)
        ib = ia.clone() if self.paired else self._index(site, rank, block, public)
        return {"ia": frozen(ia), "ib": frozen(ib), "PA": Shared(f"{kind}-A"), "PB": Shared(f"{kind}-B")}

    def _index(self, site: Site, rank: int, block: int, public: int) -> Tensor:
        own, places = self.private * self.shards, public * self.shards
        if site.device.type == "meta":
            return torch.empty(rank * self.shards, dtype=torch.long, device=site.device)
        drawn = torch.randperm(places, generator=site.generator, device=site.device)[: rank * self.shards - own]
        return torch.cat([drawn, places + block * own + torch.arange(own, device=site.device)])

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        rank = self.rank or 8
        return Footprint(rank + (2 * inputs if self.dropout else 0), kept=2 * rank * (outputs + inputs))

    def factors(self, t: Any) -> tuple[Tensor, Tensor]:
        A, B = self._assembled(t.PA, t.ia), self._assembled(t.PB, t.ib).mT
        s = scale(self.alpha, A.shape[-2], False)
        return (B if s == 1 else s * B), A

    def _assembled(self, pool: Tensor, index: Tensor) -> Tensor:
        """(*stack, rank, width): the shards of a vector side by side."""
        picked = pool.index_select(-2, index)
        return picked.reshape(*pool.shape[:-2], index.shape[0] // self.shards, self.shards * pool.shape[-1])


def type_of(name: str) -> str:
    """A layer's name without the numbers of its blocks."""
    return "-".join("*" if part.isdigit() else part for part in name.split("."))


def types(sites: Mapping[str, Site]) -> dict[str, list[Site]]:
    """The blocks of each type, in the order of the model."""
    found: dict[str, list[Site]] = {}
    for name, site in sites.items():
        found.setdefault(type_of(name), []).append(site)
    return found
