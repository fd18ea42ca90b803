"""Attention masks, True where a query (row) sees a key (column), and what packed rows need."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def causal_mask(
    length: int,
    seen: int = 0,
    *,
    documents: Int[Tensor, "*batch length"] | None = None,
    device: torch.device | None = None,
) -> Bool[Tensor, "*batch length keys"]:
    """The last `length` of seen + length tokens see themselves and those before them; of a packed row, in their own document."""
    device = device if documents is None else documents.device
    mask = torch.ones(length, seen + length, dtype=torch.bool, device=device).tril(seen)
    return mask if documents is None else mask & (documents.unsqueeze(-1) == documents.unsqueeze(-2))


def document_numbers(positions: Int[Tensor, "*batch length"]) -> Int[Tensor, "*batch length"]:
    """The number of the document each token of a packed row belongs to: positions go up by 1 inside one, and restart."""
    starts = positions.diff(dim=-1, prepend=positions[..., :1] - 1) != 1
    return starts.long().cumsum(-1)


def additive(mask: Bool[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """A mask to be added to attention scores: 0 where it is True, the smallest number elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
