"""DoRA: length and direction of each output row, trained apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from loratory.methods.fields import Positive, PositiveInt, Share
from loratory.methods.lora import scale
from loratory.methods.method import Declared, Footprint, Method, trained
from loratory.methods.start import low_rank_start
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class DoRA(Method):
    """DoRA: a trained length for each output row, and LoRA for its direction.

        W' = diag(m / c) (W + s B A),   c_i = |row i of W + s B A|, a constant in the gradient
        y = W x + bias + (m / c - 1) W x' + (m / c) s B A x',   x' = dropout(x)
        A: (rank, in)   B: (out, rank)   m: (out);  s = alpha / rank, or alpha / sqrt(rank) with rslora

    A starts random, B at 0 and m at the row lengths of W, so the model is unchanged. Trains rank * (in + out) + out numbers a
    layer; m has no weight decay. Every row i of the trained W' has length |m_i|. Each forward reads W and forms B A once.
    Raises ValueError as LoRA does, and if a row of W is zero (its direction is undefined).
    Source: arXiv 2402.09353 eq. 5 and section 4.3. Differs: nothing.
    """

    rank: PositiveInt | None = None  # >= 1; None: 8, capped at min(in, out)
    alpha: Positive | None = None  # > 0; None: the scale s is 1
    dropout: Share = 0.0  # in [0, 1)
    rslora: bool = False  # scale by 1 / sqrt(rank) instead of 1 / rank
    start: Literal["kaiming", "gaussian"] = "kaiming"

    def init(self, site: Site) -> dict[str, Declared]:
        A, B = low_rank_start(site, site.rank(self.rank, self.default_rank), self.start)
        m = torch.linalg.vector_norm(site.read().detach().to(A.dtype), dim=-1)
        if site.device.type != "meta" and not bool((m > 0).all()):
            row = int((m == 0).flatten().nonzero()[0])
            raise ValueError(
                f"layer '{site.name}' has a zero weight row ({row}), whose direction DoRA cannot keep; "
                "leave the layer out with exclude=, or use LoRA on it"
            )
        return {"A": trained(A), "B": trained(B), "m": trained(m, decay=False)}

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        rank = self.capped_rank(outputs, inputs)
        dropped = 2 * inputs if self.dropout else 0
        return Footprint(3 * outputs + rank + dropped, scratch=2 * outputs * inputs)  # B A, and W + s B A beside it

    def weight(self, t: Any, W: Tensor) -> Tensor:
        V = W.to(t.A.dtype) + scale(self.alpha, t.A.shape[-2], self.rslora) * (t.B @ t.A)
        return (t.m / row_lengths(V)).unsqueeze(-1) * V

    def forward(self, t: Any, x: Tensor, base: Callable[[Tensor], Tensor], site: Site) -> Tensor:
        s, dtype = scale(self.alpha, t.A.shape[-2], self.rslora), site.compute_dtype(x)
        with torch.no_grad():
            c = row_lengths(torch.add(site.read().to(t.A.dtype), t.B @ t.A, alpha=s))
        length = site.along_out(t.m / c)
        y, u = base(x), x
        if self.dropout and t.training:
            u = site.drop(x, self.dropout, True)
            Wu = site.product(u)
        else:
            bias = site.full_bias(y)
            Wu = y if bias is None else y - bias
        low = site.up(site.down(u, t.A.to(dtype)), (s * t.B).to(dtype))
        # length - 1 before the cast: in bfloat16 it would be rounded away
        return y + (length - 1).to(y.dtype) * Wu + length.to(y.dtype) * low


def row_lengths(V: Tensor) -> Tensor:
    """Euclidean length of each row of V (*stack, out, in), a constant in the gradient."""
    return torch.linalg.vector_norm(V.detach(), dim=-1)
