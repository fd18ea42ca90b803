"""SVFit: the largest singular values of the weight are trained."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from loratory.methods.fields import PositiveInt, Share
from loratory.methods.method import Declared, Footprint, Method, frozen, new, trained
from loratory.ops.spectral import leading, workspace
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class SVFit(Method):
    """SVFit: the largest singular values of the frozen weight are trained, in its own singular vectors.

        y = W x + U ((sigma - S) * (V^T dropout(x)))      U: (out, rank)   S, sigma: (rank)   V^T: (rank, in)
        W ~ U diag(S) V^T (the rank largest)

    sigma starts at S, so the model is unchanged, exactly. Trains rank numbers a layer; they have no weight decay, which would
    shrink the pretrained weight. sigma may become negative. The summary tells how many did, and the share of |W|^2 that U diag(S) V^T
    leaves out.
    Raises ValueError if rank < 1 or rank > min(in, out), dropout outside [0, 1), or the layer is an embedding.
    Source: arXiv 2409.05926 section 3. Differs: W stays whole and the update is U diag(sigma - S) V^T, instead of W - U diag(S) V^T
    and U diag(sigma) V^T, which is the same but for rounding; dropout is ours; a fused projection (q, k, v in one weight) is one matrix here.
    """

    rank: PositiveInt | None = None  # >= 1; None: 768, capped at min(in, out)
    dropout: Share = 0.0  # in [0, 1)
    basis: Literal["file", "weight"] = (
        "file"  # of U and V: in files, or made again from the base's weight when a file is loaded
    )
    svd: Literal["truncated", "exact"] = "truncated"  # truncated: iterated where the weight is large and the rank small

    default_rank = 768
    core_form = "diagonal"

    def init(self, site: Site) -> dict[str, Declared]:
        if site.one_hot:
            raise ValueError(
                f"layer '{site.name}' is an embedding, whose singular values SVFit does not train; leave the layer out with exclude="
            )
        rank = site.rank(self.rank, self.default_rank)
        U, s, Vh, residual = leading(site.finite(), rank, self.svd)
        site.measured["share of |W|^2 outside the trained singular values"] = residual**2
        S = new(site, *site.stack, rank).copy_(s)
        made = self.basis == "weight"
        return {
            "U": frozen(U.to(S), rebuilt=made),
            "S": frozen(S),
            "V": frozen(Vh.to(S), rebuilt=made),
            "sigma": trained(S.clone(), decay=False),
        }

    def figures(self, t: Any) -> dict[str, float]:
        return {"trained singular values below 0": float((t.sigma < 0).sum())}

    def footprint(self, outputs: int, inputs: int) -> Footprint:
        held = workspace(outputs, inputs, self.capped_rank(outputs, inputs), self.svd)
        return super().footprint(outputs, inputs)._replace(workspace=held)

    def factors(self, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        return t.U, t.sigma - t.S, t.V
