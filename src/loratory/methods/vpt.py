"""Visual prompt tuning: virtual tokens among the patches of an image."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from loratory.methods.fields import PositiveInt, Share
from loratory.methods.method import Declared, Method, new, trained
from loratory.sites.vision import VisionSite


@dataclass(frozen=True, kw_only=True)
class VPT(Method):
    """VPT: trained rows put between the class token and the patches of every image, anew before every block.

        h[0] = [class; P[0]; patches]   h[i + 1] = block i of h[i];  before block i > 0 the rows of P[i - 1] in h[i] become P[i]
        P: (blocks, tokens, width);  deep=False: (1, tokens, width), put in once
        with `hidden`: P[i] = E[i] W^T + b   E: (blocks or 1, tokens, hidden)   W: (width, hidden)

    P has no positions and starts uniform in [-v, v], v = sqrt(6 / (patch + width)) with patch = channels * height * width of a patch
    (`hidden` in place of width with it), so the model changes at once. Trains blocks * tokens * width numbers, with deep=False
    tokens * width, with `hidden` those of E, W and b. The frozen body drops nothing in training.
    Raises ValueError if tokens < 1, hidden < 1, or the body is no vision transformer with a class token.
    Source: arXiv 2203.12119, section 3.2; arXiv 2304.13639 (PVP) trains it first on another task. Differs: 50 tokens and deep by
    default, where the paper searches 1 to 200 for each task; what stands behind the class token (DeiT's second one, registers)
    stays there, behind the prompts.
    """

    acts_on: ClassVar[Literal["layers", "body", "vision"]] = "vision"

    tokens: PositiveInt = 50  # >= 1: virtual tokens
    deep: bool = True  # new ones before every block; False: before the first alone ("shallow")
    dropout: Share = 0.0  # of the prompts' numbers, for each image anew, in [0, 1)
    hidden: PositiveInt | None = (
        None  # >= 1: width of the rows that a linear layer makes the prompts from; None: no such layer
    )

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError(
                f"tokens is {self.tokens}, without which only the head would learn; give at least 1, or use HeadOnly for that"
            )
        super().__post_init__()

    def init(self, site: VisionSite) -> dict[str, Declared]:  # type: ignore[override]
        depth, width = len(site.blocks) if self.deep else 1, self.hidden or site.width
        v = math.sqrt(6 / (site.patch + width))
        E = new(site, depth, self.tokens, width).uniform_(-v, v, generator=site.generator)
        if self.hidden is None:
            return {"P": trained(E)}
        W = new(site, site.width, width).normal_(std=math.sqrt(2 / site.width), generator=site.generator)
        bound = 1 / math.sqrt(width)
        b = new(site, site.width).uniform_(-bound, bound, generator=site.generator)
        return {"E": trained(E), "W": trained(W), "b": trained(b, decay=False)}

    def inserted(self, t: Any, block: int, x: Tensor) -> Tensor | None:
        if block and not self.deep:
            return None
        P = t.P[block] if self.hidden is None else t.E[block] @ t.W.T + t.b
        return F.dropout(P.expand(x.shape[0], -1, -1), self.dropout, t.training)
