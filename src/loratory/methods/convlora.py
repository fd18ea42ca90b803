"""ConvLoRA: low-rank updates of convolutions, folded into plain kernels."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loratory.methods.fields import Positive, PositiveInt
from loratory.methods.lora import scale
from loratory.methods.method import Declared, Method, new, trained
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class ConvLoRA(Method):
    """ConvLoRA: a low-rank product, read row by row as the update of a convolution's kernel.

        y = conv(x, K + s view(B A)) + bias      K: (out, in, k, k)   s = alpha / rank
        A: (rank k, in k)   B: (out k, rank k)   view: the numbers of B A in their order, as (out, in, k, k)

    A starts Kaiming-uniform and B at 0, so the model is unchanged. Trains rank k^2 (in + out) numbers a layer. B A has rank up to
    rank k, but as a matrix (out, in k^2) up to min(out, in k^2): the view mixes taps and channels. The update is dense, so it is made
    for the product, dropped, and made again in the backward pass (`cache_delta` keeps it).
    Raises ValueError if rank < 1, alpha <= 0, or the layer is no convolution over images, has groups, or a kernel that is not square.
    Source: arXiv 2504.11271 and the authors' Lora_Conv2d. Differs: no dropout, which their code takes and never applies; any rank, as
    theirs; folding is merging, explicit and undone bit for bit.
    """

    rank: PositiveInt = 2  # >= 1; the paper: 2 in blocks, 8 in the last convolutions
    alpha: Positive | None = None  # > 0; None: the scale s is 1 (the paper: 2 rank)
    cache_delta: bool = False  # keep the update for the backward pass instead of making it again

    def init(self, site: Site) -> dict[str, Declared]:
        kernel: tuple[int, ...] = getattr(site.module, "kernel_size", ())
        if site.kind != "conv" or len(kernel) != 2 or kernel[0] != kernel[1] or site.stack:
            raise ValueError(
                f"layer '{site.name}' ({type(site.module).__name__}) is no Conv2d with a square kernel and one group, which ConvLoRA's view "
                "of B A needs; use LoRA on it, or leave the layer out with exclude="
            )
        k = kernel[0]
        channels = site.inputs // k**2
        A, B = new(site, self.rank * k, channels * k), new(site, site.outputs * k, self.rank * k)
        bound = 1 / math.sqrt(channels * k)
        return {"A": trained(A.uniform_(-bound, bound, generator=site.generator)), "B": trained(B.zero_())}

    def delta(self, t: Any) -> Tensor:
        k = t.B.shape[0] // t.shape[0]
        return (scale(self.alpha, t.A.shape[0] // k, False) * t.B @ t.A).reshape(t.shape)
