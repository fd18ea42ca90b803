"""LoRA-XS: only a rank x rank matrix is trained."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from loratory.methods.core_matrix import projection, with_projected_gradient
from loratory.methods.fields import NotNegative, Positive, PositiveInt, Share
from loratory.methods.lora import scale
from loratory.methods.method import Declared, Footprint, Method, frozen, new, trained
from loratory.ops.spectral import leading, workspace
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class LoRAXS(Method):
    """LoRA-XS: a trained small matrix between two frozen projections, the leading singular vectors of the weight.

        y = W x + s B R (A dropout(x))      A: (rank, in)   R: (rank, rank)   B: (out, rank)
        W ~ U diag(S) V^T (the rank largest),   B = U,   A = diag(S) V^T;   s = alpha / rank

    R starts normal with deviation std, so the start is W but for a change of about std (`std=0`: the model is unchanged).
    Trains rank * rank numbers a layer. Files hold A and B, since their signs are free, or a checksum of them.
    Raises ValueError if rank < 1 or rank > min(in, out), alpha <= 0, dropout outside [0, 1), std < 0, or random A and B are to be made again.
    Source: arXiv 2405.17604 eq. 2 and section 3. Differs: the SVD is exact, or iterated six times where the weight is large.
    """

    rank: PositiveInt | None = None  # >= 1; None: 64, capped at min(in, out)
    alpha: Positive | None = None  # > 0; None: the scale s is 1
    dropout: Share = 0.0  # in [0, 1)
    std: NotNegative = 1e-5  # >= 0: standard deviation of R at the start
    start: Literal["spectral", "random"] = "spectral"  # random: A and B Kaiming-uniform (the paper's ablation)
    basis: Literal["file", "weight"] = (
        "file"  # of A and B: in files, or made again from the base's weight when a file is loaded
    )
    gradient: Literal["plain", "projected"] = (
        "plain"  # projected: a step of R moves W along W's own gradient, projected
    )

    default_rank = 64
    core_form = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis == "weight" and self.start == "random":
            raise ValueError("basis is 'weight', but start 'random' draws A and B; keep them with basis='file'")

    def init(self, site: Site) -> dict[str, Declared]:
        rank = site.rank(self.rank, self.default_rank)
        A, B = new(site, *site.stack, rank, site.inputs), new(site, *site.stack, site.outputs, rank)
        if self.start == "spectral":
            U, s, Vh, residual = leading(site.finite(), rank)
            A.copy_(s.unsqueeze(-1) * Vh)
            B.copy_(U)
            site.measured["what the frozen projections leave out of W (Frobenius)"] = residual
        else:
            for matrix in (A, B):
                bound = matrix.shape[-1] ** -0.5
                nn.init.uniform_(matrix, -bound, bound, site.generator)
        R = new(site, *site.stack, rank, rank).normal_(generator=site.generator) * self.std
        made = self.basis == "weight"
        tensors = {"A": frozen(A, rebuilt=made), "R": trained(R), "B": frozen(B, rebuilt=made)}
        if self.gradient == "projected":
            P, Q = projection(B, A, scale(self.alpha, rank, False))
            tensors |= {"P": frozen(P, rebuilt=made), "Q": frozen(Q, rebuilt=made)}
        return tensors

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        held = workspace(outputs, inputs, self.capped_rank(outputs, inputs))
        return super().footprint(outputs, inputs)._replace(workspace=held)

    def factors(self, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        R = with_projected_gradient(t.R, t.P, t.Q) if self.gradient == "projected" else t.R
        s = scale(self.alpha, t.A.shape[-2], False)
        return t.B, R if s == 1 else s * R, t.A
