"""NOLA: LoRA whose factors are combinations of random matrices."""

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loratory.methods.fields import Positive, PositiveInt, Share
from loratory.methods.lora import scale
from loratory.methods.method import Declared, Footprint, Method, frozen, new, trained
from loratory.ops.random_basis import at_once, combined, kept, uniform
from loratory.sites.site import Site

SIDES = ("A", "B", "start")  # each has a key of its own
PROBED = 10  # numbers of each that the checksum of a file is of


@dataclass(frozen=True, kw_only=True)
class NOLA(Method):
    """NOLA: LoRA whose factors are sums of frozen random matrices, with trained coefficients.

        y = W x + s B (A dropout(x)),   s = alpha / rank
        A = A0 + (1/sqrt k) sum_i alpha_i MA_i   B = (1/sqrt k) sum_j beta_j MB_j   MA: (k, rank, in)   MB: (k, out, rank)
        form="vision": A = sum_i alpha_i MA_i   B = sum_j beta_j MB_j   s = 1 / rank

    alpha and beta start at 0, A0 within 1/sqrt(in) (an embedding: 1), so the model is unchanged; in the vision form they start at 1/k, so
    it changes a little. MA and MB are uniform in [-1, 1), in the vision form within 1/sqrt(rank in) and 1/sqrt(rank out). Trains
    bases + bases_B numbers a layer (for each expert or group of it), whatever its shape and rank. The matrices are made from the layer's
    own seed in each pass and dropped, a few at a time; files hold that seed and a checksum. Learning rates are about 10 times LoRA's.
    Raises ValueError if bases or rank < 1, rank > min(in, out), alpha <= 0 or given for the vision form, dropout outside [0, 1), or
    chunks does not divide the bases. Warns where there are more coefficients than entries.
    Source: arXiv 2310.02556 and the authors' code of GPT-2, LLaMA (the default) and ViT. Differs: numbers are drawn by integer arithmetic,
    so they are the same on every device, in every precision and for any chunks, and no other random numbers are touched; A0 follows from
    the seed, too; the authors' ViT layers of one shape have one basis; merging takes the trained update (theirs: A0 and B0 alone).
    """

    rank: PositiveInt | None = None  # >= 1; None: 8, capped at min(in, out)
    bases: PositiveInt = 512  # k >= 1: random matrices that A is a sum of
    bases_B: PositiveInt | None = None  # >= 1: those of B; None: as many
    alpha: Positive | None = None  # > 0; None: the scale s is 1 (vision: 1 / rank)
    dropout: Share = 0.0  # in [0, 1)
    form: Literal["language", "vision"] = "language"
    basis: Literal["seed", "memory", "file"] = "seed"  # made in each pass; kept in memory; kept there and in files
    chunks: PositiveInt | None = None  # pieces in which a basis is made, dividing bases; None: as the device suggests
    seed: int = 0  # of the bases

    coefficients: ClassVar[tuple[str, ...]] = ("alpha", "beta")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "vision" and self.alpha is not None:
            raise ValueError(f"alpha is {self.alpha}, but the vision form's scale is 1 / rank; leave alpha out")
        for k in {self.bases, self.bases_B or self.bases}:
            if self.chunks is not None and k % self.chunks:
                raise ValueError(
                    f"chunks is {self.chunks}, which does not divide the {k} bases; give a divisor or None"
                )

    def notes(self, sites: Mapping[str, Site]) -> list[str]:
        kA, kB = self.bases, self.bases_B or self.bases
        ranks = {name: site.rank(self.rank, self.default_rank) for name, site in sites.items()}
        large = [n for n, s in sites.items() if kA > ranks[n] * s.inputs or kB > ranks[n] * s.outputs]
        if not large:
            return []
        note = f"NOLA: k exceeds the number of entries of A or B in {len(large)} layers, first '{large[0]}'; use LoRA, or lower bases"
        warnings.warn(note, stacklevel=2)
        return [note]

    def init(self, site: Site) -> dict[str, Declared]:
        r, kA, kB = site.rank(self.rank, self.default_rank), self.bases, self.bases_B or self.bases
        seeds = torch.tensor(
            [_key(self.seed, site.name, side) for side in SIDES], dtype=torch.int32, device=site.device
        )
        alpha, beta = new(site, *site.stack, kA).zero_(), new(site, *site.stack, kB).zero_()
        if self.form == "vision":
            alpha.fill_(1 / kA), beta.fill_(1 / kB)
        own = {"alpha": trained(alpha, decay=False), "beta": trained(beta, decay=False), "seeds": frozen(seeds)}
        rebuilt = self.basis != "file"
        if self.form == "language":
            bound = 1.0 if site.one_hot else 1 / math.sqrt(site.inputs)
            A0 = bound * uniform(seeds[2], 0, math.prod(site.stack), r * site.inputs)
            own["A0"] = frozen(A0.to(alpha.dtype).view(*site.stack, r, site.inputs), rebuilt=rebuilt)
        if self.basis == "seed":
            probe = torch.cat([uniform(key, 0, 1, PROBED) for key in seeds[:2]])
            return own | {"probe": frozen(probe.to(alpha.dtype), rebuilt=True)}
        for i, (name, k, shape) in enumerate((("MA", kA, (r, site.inputs)), ("MB", kB, (site.outputs, r)))):
            M = self._bound(math.prod(shape)) * uniform(seeds[i], 0, k, math.prod(shape))
            own[name] = frozen(M.to(alpha.dtype).view(k, *shape), rebuilt=rebuilt)
        return own

    def _bound(self, entries: int) -> float:
        """The numbers of a random matrix lie within it."""
        return 1 / math.sqrt(entries) if self.form == "vision" else 1.0

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        r, k = self.capped_rank(outputs, inputs), max(self.bases, self.bases_B or 0)
        widest = r * max(outputs, inputs)
        made = 4 * widest * at_once(k, widest, self.chunks, "cuda") if self.basis == "seed" else 0
        return Footprint(r + (2 * inputs if self.dropout else 0), kept=2 * r * (outputs + inputs), scratch=made)

    def factors(self, t: Any) -> tuple[Tensor, Tensor]:
        *_, out, inputs = t.shape
        r = self.capped_rank(out, inputs)
        A, B = (self._sum(t, i, c, shape) for i, (c, shape) in enumerate(((t.alpha, (r, inputs)), (t.beta, (out, r)))))
        if self.form == "vision":
            return B / r, A
        s = scale(self.alpha, r, False)
        return (B if s == 1 else s * B), t.A0.to(A.dtype) + A

    def _sum(self, t: Any, side: int, c: Tensor, shape: tuple[int, int]) -> Tensor:
        """The sum of one side's random matrices, (*stack, *shape)."""
        c = c if c.dtype == torch.float64 else c.float()
        c = c if self.form == "vision" else c / math.sqrt(c.shape[-1])
        if self.basis != "seed":
            return kept(c, (t.MA, t.MB)[side])
        size = math.prod(shape)
        return combined(self._bound(size) * c, t.seeds[side], size, self.chunks).unflatten(-1, shape)


def _key(seed: int, layer: str, side: str) -> list[int]:
    """Two integers of 32 bits that differ between layers and sides."""
    digest = hashlib.sha256(f"{seed} {side} {layer}".encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)]
