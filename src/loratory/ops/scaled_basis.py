"""G[j, k, c] = lam[k, j] V[k, c] gamma[j, c]: every row k of a frozen basis V, scaled anew for each of n copies j.

`reference` is the definition. `scaled_basis` is what runs: in eager mode an autograd function that keeps V, lam and gamma, and no product
of the size of G.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def reference(
    V: Float[Tensor, "rank width"], lam: Float[Tensor, "*stack rank n"], gamma: Float[Tensor, "*stack n width"]
) -> Float[Tensor, "*stack n rank width"]:
    """The definition."""
    return lam.mT.unsqueeze(-1) * V * gamma.unsqueeze(-2)


def scaled_basis(
    V: Float[Tensor, "rank width"], lam: Float[Tensor, "*stack rank n"], gamma: Float[Tensor, "*stack n width"]
) -> Float[Tensor, "*stack n rank width"]:
    """As `reference`, keeping its arguments alone for the backward pass. V gets no gradient."""
    if torch.compiler.is_compiling():
        return reference(V.detach(), lam, gamma)
    return _ScaledBasis.apply(V, lam, gamma)


class _ScaledBasis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, V: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        ctx.save_for_backward(V, lam, gamma)
        return reference(V, lam, gamma)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        V, lam, gamma = ctx.saved_tensors
        gV = g * V
        dlam = torch.einsum("...jkc,...jc->...kj", gV, gamma) if ctx.needs_input_grad[1] else None
        dgamma = torch.einsum("...jkc,...kj->...jc", gV, lam) if ctx.needs_input_grad[2] else None
        return None, dlam, dgamma
