"""W = P L diag(D) U: permutation, unit lower, pivots, unit upper."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LDU(NamedTuple):
    order: Int[Tensor, "*stack out"]  # rows of W as they stand in L: P has a 1 at (order[k], k), and is never built
    L: Float[Tensor, "*stack out least"]
    D: Float[Tensor, "*stack least"]
    U: Float[Tensor, "*stack least in"]

    @property
    def PL(self) -> Float[Tensor, "*stack out least"]:
        """L with its rows in W's order."""
        return torch.take_along_dim(self.L, self.order.argsort(-1).unsqueeze(-1), -2)


def ldu(W: Float[Tensor, "*stack out in"]) -> LDU:
    """The factors of W with partial (row) pivoting, in W's dtype; least = min(out, in).

    A pivot that is nearly zero (below the rounding of the largest) is given as 1, and its row of U as it is: the product is W
    all the same.
    """
    packed, swaps, _ = torch.linalg.lu_factor_ex(W)  # W may be singular
    least = min(W.shape[-2:])
    order = torch.stack([_order(s, W.shape[-2]) for s in swaps.reshape(-1, least)]).view(W.shape[:-1]).to(W.device)
    L, U = packed[..., :least].tril(-1), packed[..., :least, :].triu()
    L.diagonal(dim1=-2, dim2=-1).fill_(1)
    D = torch.diagonal(U, dim1=-2, dim2=-1)
    nothing = torch.finfo(W.dtype).eps * D.abs().amax(-1, keepdim=True)
    D = torch.where(D.abs() <= nothing, torch.ones_like(D), D)
    return LDU(order, L, D, U / D.unsqueeze(-1))


def _order(swaps: Tensor, rows: int) -> Tensor:
    """The rows after row i is exchanged with row swaps[i], counted from 1, one exchange after the other."""
    order = list(range(rows))
    for i, j in enumerate(swaps.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    return torch.tensor(order)
