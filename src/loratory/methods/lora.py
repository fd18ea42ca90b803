"""LoRA, with rsLoRA's scale and LoRA+'s learning rates."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from loratory.methods.fields import Positive, PositiveInt, Share
from loratory.methods.method import Declared, Method, trained
from loratory.methods.start import low_rank_start
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """LoRA: a trained low-rank update beside the frozen weight.

        y = W x + s B (A dropout(x))      A: (rank, in)   B: (out, rank)
        s = alpha / rank, or alpha / sqrt(rank) with rslora

    A starts random and B at 0 (an embedding: A at 0, B normal), so the model is unchanged. Trains rank * (in + out) numbers a
    layer. A convolution's A has the layer's own kernel, its B is 1 x 1.
    Raises ValueError if rank < 1 or rank > min(in, out), alpha <= 0, dropout outside [0, 1), lr_ratio <= 0.
    Source: arXiv 2106.09685 eq. 3; rsLoRA arXiv 2312.03732; LoRA+ arXiv 2402.12354.
    Differs: A starts Kaiming-uniform as in the authors' code (the paper: Gaussian, `start="gaussian"`).
    """

    rank: PositiveInt | None = None  # >= 1; None: 8, capped at min(in, out)
    alpha: Positive | None = None  # > 0; None: the scale s is 1
    dropout: Share = 0.0  # in [0, 1)
    rslora: bool = False  # scale by 1 / sqrt(rank) instead of 1 / rank
    lr_ratio: Positive = 1.0  # > 0: learning rate of B over that of A (LoRA+: 16)
    start: Literal["kaiming", "gaussian"] = "kaiming"

    def init(self, site: Site) -> dict[str, Declared]:
        A, B = low_rank_start(site, site.rank(self.rank, self.default_rank), self.start)
        return {"A": trained(A), "B": trained(B, lr=self.lr_ratio)}

    def factors(self, t: Any) -> tuple[Tensor, float, Tensor]:
        return t.B, scale(self.alpha, t.A.shape[-2], self.rslora), t.A


def scale(alpha: float | None, rank: int, rslora: bool) -> float:
    """s of LoRA (alpha / rank) and rsLoRA (alpha / sqrt(rank)); 1 where alpha is None."""
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if rslora else rank)
