"""WaRA: low-rank factors on the wavelet bands of the update."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from loratory.methods.fields import Count, Positive, PositiveInt, Share
from loratory.methods.lora import scale
from loratory.methods.method import Declared, Factors, Footprint, Method, frozen, new, trained
from loratory.ops.spectral import leading
from loratory.ops.wavelet import BANDS, analyse, from_band, low_pass, on_bands
from loratory.sites.site import Site

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda c: c,
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class WaRA(Method):
    """WaRA: low-rank factors on the wavelet bands of the update.

        separate   y = W x + sum over bands ab of s_ab a^T B_ab A_ab b x     B_ab: (out/2, rank_ab)   A_ab: (rank_ab, in/2)
        shared     y = W x + s (L^T B A L + H^T B A H) x                     B: (out/2, rank)         A: (rank, in/2)
        tiny       y = W x + s L^T U R V^T L x                               R: (rank, rank); U, V of the SVD of L W L^T
        tokens     y = W x + s B T^-1 (g_ab act((T A x)_ab))                 B: (out, rank)           A: (rank, in)      g: (4)
        a, b: L or H, the low and high pass of an orthogonal wavelet with periodic extension;  s = alpha / rank

    tokens acts on tokens that stand on a grid: T is the transform of its rows and columns, (.)_ab one band of it, g_ab the band's gain
    (at 1) and act what `activation` says. Class tokens stay out of the transform and get s B act(A x). It mixes tokens, so it cannot be
    merged or exported; without gains and activation it would be LoRA, whatever the wavelet.
    With levels > 1 the LL band is split again, and every level has detail bands of its own. A starts Kaiming-uniform, B and R at 0,
    so the model is unchanged. Trains rank (in + out) / 2 numbers for each band; shared the same once; tiny rank^2; tokens rank (in + out) + 4.
    The update is one product of low rank: rank up to 4 rank (separate) or 2 rank (shared). With haar, shared is M (x) I_2, in which
    the wavelet has no part: take db2 or longer there. Neighbouring features should be related; those of most linear layers are not.
    Raises ValueError if in or out is not divisible by 2^levels (`odd="pad"` adds zero rows and columns), a rank does not fit the
    bands, every band is off, or the wavelet is not orthogonal; of tokens if there is no grid, neither gains nor activation, another number of
    tokens than the grid's and the class tokens, or the layer is not linear.
    Source: arXiv 2506.24092: version 1, abstract and figure (separate, shared); a later version (tokens, tiny). Differs: the authors'
    code is not public; no transform over tokens in `shared`, where it cancels exactly; the gains and activations, without which the
    later version's form is LoRA, the start, alpha, dropout, levels, the padding and what class tokens get are ours.
    """

    bands: Literal["separate", "shared", "tiny", "tokens"] = "separate"
    rank: PositiveInt | None = None  # >= 1, of each band; None: 4, capped
    ranks: tuple[int, ...] | None = None  # separate: of LL, LH, HL, HH in place of rank; 0: the band is off
    alpha: Positive | None = None  # > 0; None: the scale s is 1
    wavelet: str = "db2"
    levels: PositiveInt = 1  # >= 1
    odd: Literal["refuse", "pad"] = "refuse"  # a side that is not divisible by 2^levels
    grid: tuple[int, int] | None = None  # tokens: rows and columns of the patches
    class_tokens: Count = 0  # tokens: those before the patches, >= 0
    gains: bool = True  # tokens: a trained gain for each band
    activation: Literal["none", "relu", "gelu", "silu", "tanh"] = "none"  # tokens: of the coefficients, between A and B
    dropout: Share = 0.0  # in [0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        low_pass(self.wavelet)
        if self.ranks is not None:
            object.__setattr__(self, "ranks", tuple(self.ranks))
            if (
                len(self.ranks) != 4
                or not all(isinstance(r, int) and r >= 0 for r in self.ranks)
                or not any(self.ranks)
            ):
                raise ValueError(
                    f"ranks is {self.ranks}; it must hold the ranks of LL, LH, HL and HH, where 0 switches a band off, not all of them 0"
                )
            if self.bands != "separate" or self.rank is not None:
                raise ValueError("ranks= is for bands='separate' and stands in place of rank=; leave one of them out")
        if self.bands in ("shared", "tokens") and self.levels > 1:
            raise ValueError(
                f"levels is {self.levels}, but bands={self.bands!r} puts one product on all bands, which have one size at one level alone"
            )
        self._check_grid()

    def states(self, name: str) -> bool:
        """The form over tokens is a forward of its own, the others are factors."""
        return name != ("factors" if self.bands == "tokens" else "forward") and super().states(name)

    def init(self, site: Site) -> dict[str, Declared]:
        if self.bands == "tokens":
            return self._init_tokens(site)
        out, inputs = (self._padded(site, n) for n in (site.outputs, site.inputs))
        if self.bands == "tiny":
            rank = self._rank(site, self.rank, out >> self.levels, inputs >> self.levels)
            W = F.pad(site.finite().to(new(site, 0)), (0, inputs - site.inputs, 0, out - site.outputs))
            for _ in range(self.levels):
                W = analyse(analyse(W, self.wavelet, "L").mT, self.wavelet, "L").mT
            U, _, Vh, _ = leading(W, rank)
            R = new(site, *site.stack, rank, rank).zero_()
            return {"U": frozen(U.to(R)), "V": frozen(Vh.to(R)), "R": trained(R)}
        declared = {}
        for band, level, asked in self._split():
            o, i = out >> level, inputs >> level
            if rank := self._rank(site, asked, o, i):
                A, B = new(site, *site.stack, rank, i), new(site, *site.stack, o, rank)
                bound = 1 / math.sqrt(i)
                declared[f"A_{band}{level}"] = trained(A.uniform_(-bound, bound, generator=site.generator))
                declared[f"B_{band}{level}"] = trained(B.zero_())
        return declared

    def factors(self, t: Any) -> Factors:
        if self.bands == "tiny":
            s = scale(self.alpha, t.R.shape[-1], False)
            U, V = (from_band(c, self.wavelet, "L", self.levels) for c in (t.U.mT, t.V))
            return U[..., : t.shape[-2]].mT, s * t.R, V[..., : t.shape[-1]]
        B, A = [], []
        for band, level, _ in self._split():
            if (low := getattr(t, f"A_{band}{level}", None)) is None:
                continue
            high = scale(self.alpha, low.shape[-2], False) * getattr(t, f"B_{band}{level}")
            for a, b in ("LL", "HH") if self.bands == "shared" else (band,):
                B.append(from_band(high.mT, self.wavelet, a, level)[..., : t.shape[-2]].mT)
                A.append(from_band(low, self.wavelet, b, level)[..., : t.shape[-1]])
        return torch.cat(B, -1), torch.cat(A, -2)

    def forward(self, t: Any, x: Tensor, base: Callable[[Tensor], Tensor], site: Site) -> Tensor:
        """Of bands="tokens": the transform runs on the rank's channels, as it changes places with A and B."""
        dtype = site.compute_dtype(x)
        h = site.down(site.drop(x, self.dropout, t.training) if self.dropout else x, t.A.to(dtype))
        s = scale(self.alpha, t.A.shape[-2], False)
        return base(x) + site.up(self._over_grid(t, h, site.name).to(dtype), (s * t.B).to(dtype))

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        if self.bands != "tokens":
            return super().footprint(outputs, inputs)
        rank = self.rank or min(4, outputs, inputs)
        return Footprint(6 * rank + (2 * inputs if self.dropout else 0))

    def _over_grid(self, t: Any, h: Tensor, layer: str) -> Tensor:
        """h (..., tokens, rank), its patches changed band by band; in float32, as rounded taps would not invert."""
        rows, columns = self.grid or (0, 0)
        act, count = ACTIVATIONS[self.activation], rows * columns + self.class_tokens
        if h.dim() < 2 or h.shape[-2] != count:
            raise ValueError(
                f"layer '{layer}' is given {h.shape[-2] if h.dim() > 1 else 'no'} tokens, but grid {self.grid} and {self.class_tokens} class "
                f"tokens are {count}; set grid= and class_tokens= to what the model feeds this layer, or leave it out with exclude="
            )
        h = h if h.dtype == torch.float64 else h.float()
        first, patches = h.split([self.class_tokens, rows * columns], -2)
        image = F.pad(patches.mT.unflatten(-1, (rows, columns)), (0, columns % 2, 0, rows % 2))
        changed = on_bands(image, self.wavelet, lambda i, c: act(c) * t.g[i] if self.gains else act(c))
        return torch.cat([act(first), changed[..., :rows, :columns].flatten(-2).mT], -2)

    def _init_tokens(self, site: Site) -> dict[str, Declared]:
        if site.kind not in ("linear", "conv1d-transposed"):
            raise ValueError(
                f"layer '{site.name}' ({site.kind}) is not a linear layer that is called with tokens, which bands='tokens' transforms; take "
                "bands='separate' there, or leave it out with exclude="
            )
        rank = site.rank(self.rank, default=4)
        A, B = new(site, rank, site.inputs), new(site, site.outputs, rank)
        bound = 1 / math.sqrt(site.inputs)
        declared = {
            "A": trained(A.uniform_(-bound, bound, generator=site.generator)),
            "B": trained(B.zero_()),
        }
        return declared | ({"g": trained(new(site, 4).fill_(1), decay=False)} if self.gains else {})

    def _check_grid(self) -> None:
        if self.bands != "tokens":
            if self.grid is not None or self.class_tokens or not self.gains or self.activation != "none":
                raise ValueError(
                    f"grid, class_tokens, gains and activation are for bands='tokens', but bands is {self.bands!r}; leave them out"
                )
            return
        if self.grid is None:
            raise ValueError(
                "bands='tokens' needs to know how tokens stand: give grid=(rows, columns) of the patches, for example (14, 14), and "
                "class_tokens="
            )
        object.__setattr__(self, "grid", tuple(self.grid))
        if len(self.grid) != 2 or not all(isinstance(n, int) and n >= 1 for n in self.grid):
            raise ValueError(
                f"grid is {self.grid}; it must be two positive integers, the rows and columns of the patches"
            )
        if self.odd == "refuse" and any(n % 2 for n in self.grid):
            raise ValueError(f"grid is {self.grid}; both sides must be even, or padded with zeros (odd='pad')")
        if not self.gains and self.activation == "none":
            raise ValueError(
                "bands='tokens' without gains and without an activation is exactly LoRA, whatever the wavelet; take loratory.LoRA, or give "
                "gains=True or an activation"
            )

    def _split(self) -> list[tuple[str, int, int | None]]:
        """Each band with its level and the rank asked for; of the last level LL too."""
        if self.bands == "shared":
            return [("all", 1, self.rank)]
        ranks = dict(zip(BANDS, self.ranks or (self.rank,) * 4, strict=True))
        details = [(band, level, ranks[band]) for level in range(1, self.levels + 1) for band in BANDS[1:]]
        return [("LL", self.levels, ranks["LL"]), *details]

    def _padded(self, site: Site, side: int) -> int:
        unit = 1 << self.levels
        if side % unit and self.odd == "refuse":
            even = "even" if self.levels == 1 else f"multiples of {unit} as"
            raise ValueError(
                f"layer '{site.name}': wavelet rank needs {even} in/out features (got {site.inputs} x {site.outputs}); pad them with "
                "zeros (odd='pad'), or leave the layer out with exclude="
            )
        return -(-side // unit) * unit

    def _rank(self, site: Site, asked: int | None, out: int, inputs: int) -> int:
        most = min(out, inputs)
        if asked is not None and asked > most:
            raise ValueError(
                f"layer '{site.name}' has bands of {inputs} inputs and {out} outputs, so rank {asked} is too large (at most {most}); "
                "lower rank, set it for this layer with per_layer=, or leave the layer out with exclude="
            )
        return min(4, most) if asked is None else asked
