"""W = P L diag(D) U: permutation, unit lower, pivots, unit upper."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class LDU(NamedTuple):
    P: Float[Tensor, "*stack out out"]
    L: Float[Tensor, "*stack out least"]
    D: Float[Tensor, "*stack least"]
    U: Float[Tensor, "*stack least in"]


def ldu(W: Float[Tensor, "*stack out in"]) -> LDU:
    """The factors of W with partial (row) pivoting, in W's dtype; least = min(out, in).

    A pivot that is nearly zero (below the rounding of the largest) is given as 1, and its row of U as it is: the product is W
    all the same.
    """
    P, L, U = torch.linalg.lu(W)
    D = torch.diagonal(U, dim1=-2, dim2=-1)
    least = torch.finfo(W.dtype).eps * D.abs().amax(-1, keepdim=True)
    D = torch.where(D.abs() <= least, torch.ones_like(D), D)
    return LDU(P, L, D, U / D.unsqueeze(-1))
