"""The cosine transform as a matrix, and updates whose spectrum has few entries.

C_n[i, j] = sqrt(2 / n) cos((2 j + 1) i pi / (2 n)), row 0 divided by sqrt(2);   C_n C_n^T = I
D = C_M^T S C_N,   S = sum_p a_p at (row_p, col_p)
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@lru_cache(maxsize=64)
def dct_matrix(n: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "n n"]:
    """C_n; kept for all layers of one size."""
    return _computed(torch.arange(n), n).to(device, dtype)


def dct_rows(index: Tensor, n: int, dtype: torch.dtype) -> Float[Tensor, "*index n"]:
    """Rows of C_n: from the kept matrix, or computed."""
    if _real(index):
        return dct_matrix(n, index.device, dtype)[index]
    return _computed(index, n).to(dtype)


def _real(t: Tensor) -> bool:
    """Whether matrices may be kept: not those of the compiler, nor those of a run that only counts bytes."""
    return not torch.compiler.is_compiling() and type(t) is Tensor


def _computed(index: Tensor, n: int) -> Tensor:
    """In float64: a transform built in half precision would lose its orthogonality."""
    i = index.double().unsqueeze(-1)
    j = torch.arange(n, dtype=torch.float64, device=index.device)
    C = torch.cos((2 * j + 1) * i * torch.pi / (2 * n)) * (2 / n) ** 0.5
    return torch.where(i == 0, C / 2**0.5, C)


def rounded(location: Float[Tensor, "*stack 2 k"], M: int, N: int) -> tuple[Tensor, Tensor]:
    """Rows and columns as integers: half to even, inside the spectrum."""
    whole = location.detach().round().long()
    return whole[..., 0, :].clamp(0, M - 1), whole[..., 1, :].clamp(0, N - 1)


def cosine_delta_reference(
    a: Float[Tensor, "*stack k"], location: Float[Tensor, "*stack 2 k"], M: int, N: int
) -> Tensor:
    """The definition: the spectrum filled in, coinciding entries added, and transformed. Locations get no gradient."""
    rows, cols = rounded(location, M, N)
    S = a.new_zeros(*a.shape[:-1], M * N).scatter_add(-1, rows * N + cols, a).unflatten(-1, (M, N))
    C_M, C_N = (dct_matrix(n, a.device, a.dtype) for n in (M, N))
    return C_M.mT @ S @ C_N


def cosine_delta(a: Float[Tensor, "*stack k"], location: Float[Tensor, "*stack 2 k"], M: int, N: int) -> Tensor:
    """D (*stack, M, N); location in index units.

    The gradient of a is exact. That of a location is a central difference of the spectrum K of D's gradient, clamped to [-1, 1]:
    a_p / 2 (K[row + 1, col] - K[row - 1, col]), at a border with the entry itself, and so for columns.
    """
    if _autocasts(a):  # a spectrum in bfloat16 would lose its orthogonality
        with torch.autocast(a.device.type, enabled=False):
            return _CosineDelta.apply(a, location, M, N)
    return _CosineDelta.apply(a, location, M, N)


def cosine_product(x: Tensor, a: Float[Tensor, " k"], location: Float[Tensor, "2 k"], M: int, N: int) -> Tensor:
    """x D^T for x (..., N), without D: ((x C_N[col]^T) a) C_M[row]; gradients as those of `cosine_delta`."""
    if _autocasts(a):
        with torch.autocast(a.device.type, enabled=False):
            return _CosineProduct.apply(x, a, location, M, N)
    return _CosineProduct.apply(x, a, location, M, N)


def _autocasts(a: Tensor) -> bool:
    return not torch.compiler.is_compiling() and torch.is_autocast_enabled(a.device.type)


class _CosineDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, location: Tensor, M: int, N: int) -> Tensor:
        ctx.save_for_backward(a, location)
        ctx.sizes = M, N
        rows, cols = rounded(location, M, N)
        return (dct_rows(rows, M, a.dtype) * a.unsqueeze(-1)).mT @ dct_rows(cols, N, a.dtype)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, location = ctx.saved_tensors
        (M, N), G = ctx.sizes, G.to(a.dtype)
        rows, cols = rounded(location, M, N)
        needs_a, needs_location = ctx.needs_input_grad[:2]
        if not needs_location:
            K = ((dct_rows(rows, M, a.dtype) @ G) * dct_rows(cols, N, a.dtype)).sum(-1)
            return K, None, None, None
        down, right = around(rows, M), around(cols, N)
        if 3 * a.shape[-1] > M + N and _real(rows):  # the whole spectrum is cheaper than its rows
            K = (dct_matrix(M, a.device, a.dtype) @ G @ dct_matrix(N, a.device, a.dtype).mT).flatten(-2).unsqueeze(-2)
            K = K.expand(*down.shape[:-1], K.shape[-1])
            K_rows, K_cols = K.gather(-1, down * N + cols.unsqueeze(-2)), K.gather(-1, rows.unsqueeze(-2) * N + right)
        else:
            P = dct_rows(down, M, a.dtype) @ G.unsqueeze(-3)
            K_rows = (P * dct_rows(cols, N, a.dtype).unsqueeze(-3)).sum(-1)
            K_cols = (P[..., :1, :, :] * dct_rows(right, N, a.dtype)).sum(-1)
        return K_rows[..., 0, :] if needs_a else None, _differences(a, K_rows, K_cols), None, None


class _CosineProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, location: Tensor, M: int, N: int) -> Tensor:
        ctx.save_for_backward(x, a, location)
        ctx.sizes = M, N
        rows, cols = rounded(location, M, N)
        left, right = dct_rows(rows, M, a.dtype).to(x.dtype), dct_rows(cols, N, a.dtype).to(x.dtype)
        return ((x @ right.mT) * a.to(x.dtype)) @ left

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, a, location = ctx.saved_tensors
        M, N = ctx.sizes
        needs_x, needs_a, needs_location = ctx.needs_input_grad[:3]
        k, dtype = a.shape[0], x.dtype
        rows, cols = rounded(location, M, N)
        down, right = (around(rows, M), around(cols, N)) if needs_location else (rows.unsqueeze(0), cols.unsqueeze(0))
        g2, x2 = g.reshape(-1, M), x.reshape(-1, N)
        of_g = (g2 @ dct_rows(down, M, a.dtype).flatten(0, 1).to(dtype).mT).unflatten(-1, (-1, k))
        of_x = (x2 @ dct_rows(right, N, a.dtype).flatten(0, 1).to(dtype).mT).unflatten(-1, (-1, k))
        dx = None
        if needs_x:
            dx = ((of_g[:, 0] * a.to(dtype)) @ dct_rows(cols, N, a.dtype).to(dtype)).reshape(x.shape)
        of_g, of_x = of_g.to(a.dtype), of_x.to(a.dtype)
        K_rows = (of_g * of_x[:, :1]).sum(0)
        if not needs_location:
            return dx, K_rows[0] if needs_a else None, None, None, None
        K_cols = (of_g[:, :1] * of_x).sum(0)
        return dx, K_rows[0] if needs_a else None, _differences(a, K_rows, K_cols), None, None


def around(index: Tensor, n: int) -> Tensor:
    """(*stack, 3, k): each index, the next one and the one before; at a border the index itself."""
    return torch.stack([index, (index + 1).clamp(max=n - 1), (index - 1).clamp(min=0)], -2)


def _differences(a: Tensor, K_rows: Tensor, K_cols: Tensor) -> Tensor:
    """The gradient of locations from the spectrum around them (`around`), by rows and by columns."""
    down, right = (K[..., 1, :] - K[..., 2, :] for K in (K_rows, K_cols))
    return torch.stack([(a / 2 * down).clamp(-1, 1), (a / 2 * right).clamp(-1, 1)], -2)
