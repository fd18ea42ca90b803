"""The trained matrix between two frozen projections, which LoRA-XS and LoRA-SB share.

W' = W + s B R A        A: (rank, in) and B: (out, rank) frozen, R: (rank, rank) trained
"""

import torch
from torch import Tensor


def projection(B: Tensor, A: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """P = (B^T B)^-1 / s^2 and Q = (A A^T)^-1: P g Q is the gradient of R whose step moves W nearest to where W's own would.

    Of all matrices s B X A the one with X = P g Q is nearest to W's gradient (Frobenius), where g is the gradient of R.
    Source: arXiv 2411.19557, the gradient scaling of its section on LoRA-XS's form.
    """
    return torch.linalg.inv(B.mT @ B) / s**2, torch.linalg.inv(A @ A.mT)


def with_projected_gradient(R: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    """R itself, whose gradient g arrives as P g Q (P and Q are symmetric)."""
    PRQ = P @ R @ Q
    return R.detach() + (PRQ - PRQ.detach())
