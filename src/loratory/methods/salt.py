"""SALT: the largest singular values scaled and shifted, a low-rank update of the others."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loratory.methods.fields import NotNegative, PositiveInt, PositiveShare
from loratory.methods.method import Declared, Footprint, Method, frozen, new, trained
from loratory.ops.spectral import leading, workspace
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class SALT(Method):
    """SALT: the largest singular values scaled and shifted, and a low-rank update of the others, in the weight's own basis.

        W' = U relu(N) V^T,  N = [diag(A * S[:k] + B), 0; 0, diag(S[k:]) + X Y],  W = U diag(S) V^T, p = min(out, in)
        y = W x + bias + U ((relu(N) - diag(S)) V^T x)
        U: (out, p)  S: (p)  V^T: (p, in)  A, B: (k)  X: (p - k, rank)  Y: (rank, p - k)
        penalty = regularizer (|A * S[:k] + B - S[:k]| + |X Y|)     (Euclidean; `loratory.penalty`)

    A starts at 1, B and Y at 0, X uniform within sqrt(6 / rank), so the model is unchanged; start="normal" draws X and Y with deviation
    0.01, which changes it. Trains 2 * k + 2 * rank * (p - k) numbers a layer.
    While Y is 0, relu lets gradient reach it through the diagonal alone; an entry below 0 gets none until another step lifts it.
    Raises ValueError if ratio is not in (0, 1], top > p, rank < 1, regularizer < 0, or the layer is an embedding or a grouped convolution.
    Source: arXiv 2503.16055 section 3. Differs: the start is exact, because the base's product is kept and the change of N added; A
    and B have no weight decay, which would shrink the largest values (decay=True decays them, as the released code does).
    """

    ratio: PositiveShare = 0.1  # in (0, 1]: k = max(1, floor(ratio p))
    top: PositiveInt | None = None  # >= 1: k itself; None: from ratio
    rank: PositiveInt | None = None  # >= 1; None: 256, capped at p - k
    regularizer: NotNegative = 0.01  # >= 0: weight of the penalty in the loss
    start: Literal["kaiming", "normal"] = "kaiming"
    relu: Literal["whole", "diagonal", "none"] = "whole"  # which entries of N may not be negative
    decay: bool = False  # weight decay on A and B
    basis: Literal["file", "weight"] = (
        "file"  # of U and V: in files, or made again from the base's weight when a file is loaded
    )

    def init(self, site: Site) -> dict[str, Declared]:
        if site.one_hot or (site.kind == "conv" and site.stack):
            kind = "an embedding" if site.one_hot else "a grouped convolution"
            raise ValueError(
                f"layer '{site.name}' is {kind}, which SALT has no form for (linear layers and whole convolutions); leave it out with exclude="
            )
        p = min(site.outputs, site.inputs)
        k = max(1, math.floor(self.ratio * p)) if self.top is None else self.top
        if k > p:
            raise ValueError(
                f"layer '{site.name}' has {p} singular values, so top {k} is too large; lower top, or leave the layer out with exclude="
            )
        U, s, Vh, _ = leading(site.finite(), p, "exact")
        S = new(site, *site.stack, p).copy_(s)
        A, B = torch.ones_like(S[..., :k]), torch.zeros_like(S[..., :k])
        made = self.basis == "weight"
        tensors = {
            "U": frozen(U.to(S), rebuilt=made),
            "S": frozen(S),
            "V": frozen(Vh.to(S), rebuilt=made),
            "A": trained(A, decay=self.decay),
            "B": trained(B, decay=self.decay),
        }
        if k < p:
            rank = min(256, p - k) if self.rank is None else site.rank(self.rank, default=256)
            if rank > p - k:
                warnings.warn(
                    f"layer '{site.name}': rank {rank} is more than the {p - k} singular values that X Y updates, so some of it is wasted",
                    stacklevel=2,
                )
            X, Y = new(site, *site.stack, p - k, rank), new(site, *site.stack, rank, p - k)
            if self.start == "kaiming":
                bound = math.sqrt(6 / rank)
                X.uniform_(-bound, bound, generator=site.generator)
                Y.zero_()
            else:
                X.normal_(std=0.01, generator=site.generator)
                Y.normal_(std=0.01, generator=site.generator)
            tensors |= {"X": trained(X), "Y": trained(Y)}
        return tensors

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        p = min(outputs, inputs)
        held = workspace(outputs, inputs, p, "exact")
        return Footprint(2 * p, kept=3 * p * p, scratch=3 * p * p, workspace=held)  # N, relu(N) and the change of N

    def core(self, t: Any) -> Tensor:
        """N before relu (*stack, p, p)."""
        k, p = t.A.shape[-1], t.S.shape[-1]
        N = torch.diag_embed(t.A * t.S[..., :k] + t.B)
        if k == p:
            return N
        tail = torch.diag_embed(t.S[..., k:]) + t.X @ t.Y
        corner = N.new_zeros(*N.shape[:-2], k, p - k)
        return torch.cat([torch.cat([N, corner], -1), torch.cat([corner.mT, tail], -1)], -2)

    def factors(self, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        N = self.core(t)
        if self.relu == "whole":
            N = torch.relu(N)
        elif self.relu == "diagonal":
            N = N + torch.diag_embed(torch.relu(-torch.diagonal(N, dim1=-2, dim2=-1)))
        return t.U, N - torch.diag_embed(t.S), t.V

    def forward(self, t: Any, x: Tensor, base: Callable[[Tensor], Tensor], site: Site) -> Tensor:
        dtype = site.compute_dtype(x)
        U, core, V = (factor.to(dtype) for factor in self.factors(t))
        return base(x) + site.up(
            site.up(site.down(x, V), core), U
        )  # U core is never built: it costs p products of out x p

    def penalty(self, t: Any) -> Tensor | None:
        if not self.regularizer:
            return None
        S = t.S[..., : t.A.shape[-1]]
        change = torch.linalg.vector_norm(t.A * S + t.B - S)
        if hasattr(t, "X"):
            change = change + torch.linalg.vector_norm(t.X @ t.Y)
        return self.regularizer * change
