"""Truncated decompositions against the full one."""

import pytest
import torch

from loratory.ops import svd


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (3, 6, 4), (2, 3, 4, 9)])
def test_small_matrices_are_exact(shape: tuple[int, ...]):
    M = torch.randn(*shape, dtype=torch.float64)
    U, s, Vh = svd.truncated_svd(M, 3)
    assert (U.shape, s.shape, Vh.shape) == ((*shape[:-1], 3), (*shape[:-2], 3), (*shape[:-2], 3, shape[-1]))
    torch.testing.assert_close(s, torch.linalg.svdvals(M)[..., :3])
    B, A = svd.balanced(U, s, Vh)
    error = torch.linalg.vector_norm(M - B @ A, dim=(-2, -1))
    torch.testing.assert_close(error, torch.linalg.svdvals(M)[..., 3:].norm(dim=-1), atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(B.mT @ B, A @ A.mT, atol=1e-9, rtol=0)


def test_large_matrices_are_near_the_optimum_and_repeat(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(svd, "EXACT", 16)
    M = torch.randn(160, 140, dtype=torch.float64)  # no gap in the spectrum: the hard case
    U, s, Vh = svd.truncated_svd(M, 4)
    optimum = float(torch.linalg.svdvals(M)[4:].norm())
    assert optimum <= float((M - U * s @ Vh).norm()) <= 1.005 * optimum
    assert torch.equal(svd.truncated_svd(M, 4)[0], U)
    torch.testing.assert_close(U.mT @ U, torch.eye(4, dtype=torch.float64))
    low = torch.randn(160, 3, dtype=torch.float64) @ torch.randn(3, 140, dtype=torch.float64)
    U, s, Vh = svd.truncated_svd(low, 4)
    assert float((low - U * s @ Vh).norm()) < 1e-10 * float(low.norm())
    torch.testing.assert_close(svd.truncated_svd(M, 100)[1], torch.linalg.svdvals(M)[:100])  # a large rank: exact


@pytest.mark.parametrize(("out", "rank", "columns"), [(9, 3, 7), (4, 6, 5), (2, 8, 30)])
def test_products_are_decomposed_from_their_factors(out: int, rank: int, columns: int):
    B, A = torch.randn(2, out, rank, dtype=torch.float64), torch.randn(2, rank, columns, dtype=torch.float64)
    U, s, Vh = svd.svd_of_product(B, A)
    least = min(out, rank, columns)
    assert s.shape == (2, least)
    torch.testing.assert_close(U * s.unsqueeze(-2) @ Vh, B @ A)
    torch.testing.assert_close(s, torch.linalg.svdvals(B @ A)[:, :least])
    assert svd.norm_of_product(B, A) == pytest.approx(float((B @ A).norm()))
