"""Prefix tuning: virtual keys and values before those of every attention block."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loratory.methods.fields import PositiveInt
from loratory.methods.method import Declared, Method, check_ids, new, trained
from loratory.sites.block import BlockSite


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """PrefixTuning: trained keys and values put before those of every attention block.

        attention(q, [K_i; k], [V_i; v]) in block i;  K_i = P[:, i, 0], V_i = P[:, i, 1]
        P: (tokens, blocks, 2, heads, head_dim), or with `hidden`: P[:, i] = W2[i] tanh(W1 E + b1) + b2[i]
        E: (tokens, heads * head_dim)   W1: (hidden, heads * head_dim)   W2: (blocks, 2, heads, head_dim, hidden)

    heads: key and value heads. K_i is not rotated; real tokens move up by `tokens` positions. P starts near 0 (normal, 0.02), so
    text attends to the prefix as to empty tokens; or, from `ids`, at the model's own keys and values of these tokens: the model
    then reads every text after them. Trains tokens * blocks * 2 * heads * head_dim numbers, with `hidden` those of E, W1, b1, W2, b2.
    Raises ValueError if tokens < 1, hidden < 1, ids come with hidden, or no attention block takes keys and values.
    Source: arXiv 2101.00190, eq. 3 and section 4.3. Differs: without `hidden` by default; the prefix never leaves a sliding window.
    """

    acts_on: ClassVar[Literal["layers", "body", "vision"]] = "body"

    tokens: PositiveInt = 10  # >= 1: virtual tokens
    hidden: PositiveInt | None = (
        None  # >= 1: width of the network that makes P (the paper: 800 or 512); None: P itself is trained
    )
    ids: tuple[int, ...] | None = None  # token ids to start from, repeated or cut to `tokens`

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ids", check_ids(self.ids))
        if self.ids and self.hidden:
            raise ValueError(
                f"hidden is {self.hidden} and ids are given, but the keys and values of tokens cannot be put into the network that "
                "makes P; leave one of them out"
            )

    def init(self, site: BlockSite) -> dict[str, Declared]:  # type: ignore[override]
        shape = (site.blocks, 2, site.heads, site.head_dim)
        if self.hidden is not None:
            width = site.heads * site.head_dim
            E = new(site, self.tokens, width).normal_(generator=site.generator)
            W1, b1 = self._linear(site, (self.hidden,), width)
            W2, b2 = self._linear(site, shape, self.hidden)
            return {
                "E": trained(E),
                "W1": trained(W1),
                "b1": trained(b1, decay=False),
                "W2": trained(W2),
                "b2": trained(b2, decay=False),
            }
        P = new(site, self.tokens, *shape).normal_(std=0.02, generator=site.generator)
        if self.ids and not P.is_meta:
            for i, each in enumerate(site.keys_values(self.ids, self.tokens)):
                P[:, :, i] = each.permute(2, 0, 1, 3)
        return {"P": trained(P)}

    def _linear(self, site: BlockSite, outputs: tuple[int, ...], inputs: int) -> tuple[Tensor, Tensor]:
        bound = 1 / math.sqrt(inputs)
        W, b = new(site, *outputs, inputs), new(site, *outputs)
        return W.uniform_(-bound, bound, generator=site.generator), b.uniform_(-bound, bound, generator=site.generator)

    def prefix(self, t: Any, block: int) -> tuple[Tensor, Tensor]:
        if self.hidden is None:
            K, V = t.P[:, block].permute(1, 2, 0, 3)  # (2, heads, tokens, head_dim)
        else:
            h = torch.tanh(t.E @ t.W1.T + t.b1)  # (tokens, hidden)
            K, V = h @ t.W2[block].transpose(-1, -2) + t.b2[block].unsqueeze(-2)
        return K, V
