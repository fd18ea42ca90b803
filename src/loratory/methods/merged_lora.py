"""LoRA for one projection that holds several (a fused q, k, v)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loratory.methods.fields import Positive, PositiveInt, Share
from loratory.methods.lora import scale
from loratory.methods.method import Declared, Method, trained
from loratory.methods.start import low_rank_start
from loratory.sites.site import Site


@dataclass(frozen=True, kw_only=True)
class MergedLoRA(Method):
    """MergedLoRA: LoRA on chosen row blocks of a fused projection (q, k, v in one weight).

        block i of y = W_i x + s B_i (A_i x) where groups[i], else W_i x;  s = alpha / rank
        A: (rank * n, in)   B: (out / len(groups) * n, rank), the n adapted blocks one after the other

    The same as a LoRA on each adapted block. A starts Kaiming-uniform and B at 0, so the model is unchanged.
    Trains n * rank * (in + out / len(groups)) numbers a layer.
    Raises ValueError if out is not divisible by len(groups), no group is adapted, or rank > min(in, out / len(groups)).
    Source: arXiv 2106.09685, layer MergedLinear of the authors' code. Differs: nothing.
    """

    groups: tuple[bool, ...] = (True, False, True)  # which row blocks are adapted: q and v
    rank: PositiveInt | None = None  # >= 1; None: 8, capped
    alpha: Positive | None = None  # > 0; None: the scale s is 1
    dropout: Share = 0.0  # in [0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "groups", tuple(self.groups))
        if not any(self.groups) or not all(isinstance(on, bool) for on in self.groups):
            raise ValueError(
                f"groups is {self.groups}; it must hold one True or False for each block, at least one of them True"
            )

    def init(self, site: Site) -> dict[str, Declared]:
        blocks, n = len(self.groups), sum(self.groups)
        if site.outputs % blocks or site.stack or site.kind not in ("linear", "conv1d-transposed", "parameter"):
            raise ValueError(
                f"layer '{site.name}' ({site.kind}) has {site.outputs} outputs; MergedLoRA needs a linear layer whose outputs are "
                f"divisible by its {blocks} groups; give other groups=, or leave the layer out with exclude="
            )
        rows = site.outputs // blocks
        rank = site.rank(self.rank, default=min(8, rows))
        if rank > rows:
            raise ValueError(
                f"layer '{site.name}' has blocks of {rows} rows, so rank {rank} is too large (at most {rows}); lower rank"
            )
        A, B = low_rank_start(site, rank * n, "kaiming")
        return {"A": trained(A), "B": trained(B[: rows * n, :rank].clone())}

    def factors(self, t: Any) -> tuple[Tensor, Tensor]:
        n, rank = sum(self.groups), t.B.shape[1]
        rows = t.B.shape[0] // n
        adapted = iter((scale(self.alpha, rank, False) * t.B).split(rows))
        ranks = iter(range(n))
        blocks = []
        for on in self.groups:
            block = t.B.new_zeros(rows, n * rank)
            if on:
                i = next(ranks)
                block = torch.cat(
                    [t.B.new_zeros(rows, i * rank), next(adapted), t.B.new_zeros(rows, (n - 1 - i) * rank)], 1
                )
            blocks.append(block)
        return torch.cat(blocks), t.A
