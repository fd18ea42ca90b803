"""Truncated singular value decompositions; of a product B A without forming it.

Leading dimensions (conv groups, experts) are batch dimensions: the rank is one of each entry.
"""

import torch
from jaxtyping import Float
from torch import Tensor

EXACT, MORE, PASSES = 1024, 16, 6  # min(out, in) up to which the full SVD runs; extra columns and passes of the other


def is_iterated(least: int, rank: int) -> bool:
    """Whether `truncated_svd` iterates, for min(out, in) and a rank."""
    return least > EXACT and 4 * (rank + MORE) <= least


def truncated_svd(
    M: Float[Tensor, "*stack out in"], rank: int, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "*stack out rank"], Float[Tensor, "*stack rank"], Float[Tensor, "*stack rank in"]]:
    """U, s, V^T of the `rank` largest singular values (at most min(out, in)).

    Large matrices with a small rank: subspace iteration from a random start (arXiv 0909.4061, algorithm 4.4), whose error is
    the optimum within a fraction of a per cent; the start is the generator's, by default the same at every call.
    """
    rank, least = min(rank, *M.shape[-2:]), min(M.shape[-2:])
    if not is_iterated(least, rank):
        U, s, Vh = torch.linalg.svd(M, full_matrices=False)
        return U[..., :rank], s[..., :rank], Vh[..., :rank, :]
    generator = generator or torch.Generator().manual_seed(0)
    start = torch.randn(*M.shape[:-2], M.shape[-1], rank + MORE, generator=generator, device=generator.device)
    Q = torch.linalg.qr(M @ start.to(M)).Q
    for _ in range(PASSES):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q).Q).Q
    U, s, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return Q @ U[..., :rank], s[..., :rank], Vh[..., :rank, :]


def svd_of_product(
    B: Float[Tensor, "*stack out rank"], A: Float[Tensor, "*stack rank in"]
) -> tuple[Float[Tensor, "*stack out least"], Float[Tensor, "*stack least"], Float[Tensor, "*stack least in"]]:
    """U, s, V^T of B A, all min(out, rank, in) values; B A itself is never built."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, s, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ U, s, Vh @ Q_A.mT


def norm_of_product(B: Float[Tensor, "*stack out rank"], A: Float[Tensor, "*stack rank in"]) -> float:
    """Frobenius norm of B A, which is never built."""
    return float(torch.linalg.vector_norm(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT))


def balanced(
    U: Float[Tensor, "*stack out rank"], s: Float[Tensor, "*stack rank"], Vh: Float[Tensor, "*stack rank in"]
) -> tuple[Float[Tensor, "*stack out rank"], Float[Tensor, "*stack rank in"]]:
    """B = U sqrt(s) and A = sqrt(s) V^T: factors of equal size, so that training may go on from them."""
    root = s.sqrt()
    return U * root.unsqueeze(-2), root.unsqueeze(-1) * Vh
