"""Prompt tuning: virtual tokens before the text."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loratory.methods.fields import PositiveInt
from loratory.methods.method import Declared, Method, check_ids, new, trained
from loratory.sites.block import BlockSite


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """PromptTuning: trained rows put before the input embeddings of every text.

        h = body([P; E x])      P: (tokens, width)   E x: the text's embeddings (length, width)

    P starts as the embeddings of the tokens `ids` (the model then reads every text after these tokens), or of tokens drawn from
    the vocabulary. Trains tokens * width numbers. Real tokens move up by `tokens` positions; outputs are as long as the text.
    Raises ValueError if tokens < 1, an id is not in the vocabulary, or text and prompt exceed a learned table of positions.
    Source: arXiv 2104.08691, section 2. Differs: drawn from the whole vocabulary, not its 5,000 most common tokens; an encoder's
    pooled output is that of the first real token.
    """

    acts_on: ClassVar[Literal["layers", "body", "vision"]] = "body"

    tokens: PositiveInt = 100  # >= 1: virtual tokens
    ids: tuple[int, ...] | None = None  # token ids to start from, repeated or cut to `tokens`; None: drawn

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ids", check_ids(self.ids))

    def init(self, site: BlockSite) -> dict[str, Declared]:  # type: ignore[override]
        P = new(site, self.tokens, site.width)
        if P.is_meta:
            return {"P": trained(P)}
        drawn = torch.randint(site.vocabulary, (self.tokens,), device=site.device, generator=site.generator)
        return {"P": trained(P.copy_(site.rows(self.ids or tuple(drawn.tolist()), self.tokens)))}

    def prompt(self, t: Any) -> Tensor:
        return t.P
