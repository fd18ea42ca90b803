"""Matrices in tensor-ring form: an entry is the trace of a product of small matrices, one from each core.

M[i, j] = trace(C1[i_1, j_1] ... Cn[i_n, j_n]),   i = (i_1 .. i_n), j = (j_1 .. j_n), first index slowest
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def balanced(size: int, count: int) -> tuple[int, ...]:
    """Factors of a size, as equal as its primes allow."""
    primes, rest, prime = [], size, 2
    while prime * prime <= rest:
        while rest % prime == 0:
            primes.append(prime)
            rest //= prime
        prime += 1
    if rest > 1:
        primes.append(rest)
    factors = [1] * count
    for prime in reversed(primes):
        factors[factors.index(min(factors))] *= prime
    return tuple(sorted(factors))


def ring_matrix(cores: Sequence[Tensor]) -> Tensor:
    """(*stack, i, j) from cores (*stack, i_d, j_d, R, R): the trace of their products."""
    M = cores[0]
    for core in cores[1:-1]:
        M = torch.einsum("...ijab,...klbc->...ikjlac", M, core).flatten(-6, -5).flatten(-4, -3)
    if len(cores) == 1:
        return torch.diagonal(M, dim1=-2, dim2=-1).sum(-1)
    return torch.einsum("...ijab,...klba->...ikjl", M, cores[-1]).flatten(-4, -3).flatten(-2)


def ring_change(cores: Sequence[Tensor]) -> Tensor:
    """M - I of a square one."""
    M = ring_matrix(cores)
    return M - torch.eye(M.shape[-1], device=M.device, dtype=M.dtype)


def ring_rows(cores: Sequence[Tensor]) -> Tensor:
    """(*stack, i, R, R) from cores (*stack, i_d, R, R): their products."""
    P = cores[0]
    for core in cores[1:]:
        P = torch.einsum("...iab,...kbc->...ikac", P, core).flatten(-4, -3)
    return P


def ring_identity(sizes: Sequence[int], R: int, like: Tensor, generator: torch.Generator | None) -> list[Tensor]:
    """Cores (i_d, i_d, R, R) of M = I: each is I_d (x) G_d, where the product of the G_d has trace 1.

    Without a generator every entry of every G_d is 1 / R; with one they are orthogonal matrices at random, the first one scaled.
    """
    gauges = [torch.full((R, R), 1 / R, device=like.device, dtype=like.dtype) for _ in sizes]
    closed = 1.0 if generator is None else 0.0
    while abs(closed) < 0.1:
        gauges = [_orthogonal(torch.empty_like(G).normal_(generator=generator)) for G in gauges]
        closed = float(functools.reduce(torch.matmul, gauges).trace())
    gauges[0] = gauges[0] / closed
    eyes = [torch.eye(size, device=like.device, dtype=like.dtype) for size in sizes]
    return [eye[:, :, None, None] * G for eye, G in zip(eyes, gauges, strict=True)]


def _orthogonal(drawn: Tensor) -> Tensor:
    """The orthogonal factor, of either determinant: that of qr alone is fixed, and three of one sign may have no trace."""
    Q, R = torch.linalg.qr(drawn)
    return Q * torch.sign(torch.diagonal(R))
