"""Ways to combine the same tensor of several adapters: weighted sum, TIES (arXiv 2306.01708), DARE (arXiv 2311.03099).

`tensors` (adapters, ...) are stacked, `weights` (adapters); `density` is the share of numbers that is kept, in (0, 1].
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Sign = Literal["total", "frequency"]


def weighted_sum(tensors: Float[Tensor, "adapters ..."], weights: Float[Tensor, " adapters"]) -> Tensor:
    return torch.tensordot(weights.to(tensors), tensors, dims=1)


def trim(tensor: Float[Tensor, "..."], density: float) -> Float[Tensor, "..."]:
    """Keep the floor(density * n) largest numbers by size, others 0."""
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).reshape(tensor.shape)


def drop_and_rescale(
    tensor: Float[Tensor, "..."], density: float, generator: torch.Generator | None
) -> Float[Tensor, "..."]:
    """DARE: keep each number with probability density, divided by it, so that the expectation stays."""
    if density >= 1:
        return tensor
    kept = torch.bernoulli(torch.full(tensor.shape, density, dtype=tensor.dtype), generator=generator)
    return tensor * kept.to(tensor.device) / density


def elect(
    tensors: Float[Tensor, "adapters ..."], weights: Float[Tensor, " adapters"], sign: Sign
) -> Float[Tensor, "..."]:
    """TIES after trimming: the mean, at each place, of the weighted numbers whose sign is the elected one.

    Elected is the sign of the sum of the numbers ("total") or of their signs ("frequency"); plus where that is 0.
    """
    signs = tensors.sign()
    votes = (tensors if sign == "total" else signs).sum(0)
    agree = signs == torch.where(votes >= 0, 1.0, -1.0)
    return weighted_sum(tensors * agree, weights) / agree.sum(0).clamp(min=1)


def combined(
    tensors: list[Tensor],
    weights: Float[Tensor, " adapters"],
    scheme: str,
    *,
    density: float = 1.0,
    sign: Sign = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One tensor of several by a scheme: linear, magnitude_prune, ties, dare_linear, dare_ties."""
    if scheme in ("ties", "magnitude_prune"):
        tensors = [trim(t, density) for t in tensors]
    elif scheme in ("dare_linear", "dare_ties"):
        tensors = [drop_and_rescale(t, density, generator) for t in tensors]
    stacked = torch.stack(tensors)
    return elect(stacked, weights, sign) if scheme in ("ties", "dare_ties") else weighted_sum(stacked, weights)
