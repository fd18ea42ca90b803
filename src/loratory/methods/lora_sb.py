"""LoRA-SB: LoRA-XS's form, started from the first step of full fine-tuning."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from loratory.methods.core_matrix import projection, with_projected_gradient
from loratory.methods.fields import Positive, PositiveInt, Share, check_not_negative, check_positive, check_positive_int
from loratory.methods.lora import scale
from loratory.methods.method import Declared, Method, frozen, new, trained
from loratory.ops.spectral import leading
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class LoRASB(Method):
    """LoRA-SB: a trained small matrix between two frozen projections that hold the first step of full fine-tuning best.

        y = W x + s B R (A dropout(x))      A: (rank, in)   R: (rank, rank)   B: (out, rank)
        D = -first_step sign(G),  G: the loss's gradient of W, summed over `samples` training rows
        D ~ U diag(S) V^T (the rank largest),   B = U,   A = V^T,   R = diag(S) / s;   s = alpha / rank

    The start is W + s B R A, the best rank-rank part of Adam's first step, and so not the base's function (LoRAXS with std=0 keeps
    that). Trains rank * rank numbers a layer. Needs training batches: `adapt(..., seen=loratory.collect(model, batches))`.
    With s = 1 plain SGD on R is the orthogonal projection of SGD on W.
    Raises ValueError if rank < 1 or rank > min(in, out), alpha <= 0, dropout outside [0, 1), first_step <= 0, samples < 1, nothing was
    collected, or a layer's gradient is zero.
    Source: arXiv 2411.19557 sections 3.2 to 3.4. Differs: the SVD is exact, or iterated six times where the weight is large, and its
    factors stay in float32; without warm-up first_step is the rate itself; total steps are optimizer steps.
    """

    rank: PositiveInt | None = None  # >= 1; None: 96, capped at min(in, out)
    alpha: Positive | None = None  # > 0; None: the scale s is 1
    dropout: Share = 0.0  # in [0, 1)
    first_step: Positive | None = (
        None  # > 0: rate of the first step; None: that of the run's first warm-up step, else 1e-5
    )
    samples: PositiveInt = 170  # >= 1: training rows that `loratory train` collects the gradient from
    gradient: Literal["plain", "projected"] = "plain"  # projected: takes the scale s out of the step's size

    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})

    default_rank = 96
    core_form = "matrix"

    @property
    def rows_to_collect(self) -> int:
        return self.samples

    def planned(self, *, learning_rate: float, warmup: float, steps: int) -> "LoRASB":
        """With the first step of a run: the rate after the first of its warm-up steps."""
        check_positive("learning_rate", learning_rate)
        check_not_negative("warmup", warmup)
        check_positive_int("steps", steps)
        if self.first_step is not None:
            return self
        return replace(self, first_step=learning_rate / max(1.0, warmup * steps))

    def init(self, site: Site) -> dict[str, Declared]:
        rank = site.rank(self.rank, self.default_rank)
        G = site.seen.gradient
        if site.device.type != "meta" and not bool(G.any()):
            raise ValueError(
                f"layer '{site.name}' received no gradient (all of it is zero); is it frozen, unused or detached? leave it out with exclude="
            )
        step, s = self.first_step or 1e-5, scale(self.alpha, rank, False)
        A, B = new(site, *site.stack, rank, site.inputs), new(site, *site.stack, site.outputs, rank)
        U, S, Vh, residual = leading(-step * G.to(A).sign(), rank, keep=False)
        A.copy_(Vh)
        B.copy_(U)
        R = (S / s).diag_embed()
        site.measured["share of the first step's energy that the start holds"] = 1 - residual**2
        if not A.is_meta:
            whole = site.read().detach().norm().clamp_min(1e-30)
            site.measured["what the start changes of W (Frobenius)"] = float(S.norm() / whole)
        tensors = {"A": frozen(A), "R": trained(R.to(A)), "B": frozen(B)}
        if self.gradient == "projected":
            P, Q = projection(B, A, s)
            tensors |= {"P": frozen(P), "Q": frozen(Q)}
        return tensors

    def factors(self, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        R = with_projected_gradient(t.R, t.P, t.Q) if self.gradient == "projected" else t.R
        s = scale(self.alpha, t.A.shape[-2], False)
        return t.B, R if s == 1 else s * R, t.A
