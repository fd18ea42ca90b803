"""y = x W^T + bias + (u A^T) B^T: a frozen linear layer and a low-rank update, as one autograd node.

`reference` is the definition. `low_rank_linear` is what runs: in eager mode one autograd function that adds the update into
the base product in place, forward and backward, and keeps the weights, u where A is trained, and u A^T where B is; under
torch.compile the definition itself, which the compiler fuses on its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_fused = True


@contextmanager
def unfused() -> Iterator[None]:
    """Run the definition instead of the fused function inside this block; it has derivatives of every order."""
    global _fused
    before, _fused = _fused, False
    try:
        yield
    finally:
        _fused = before


def reference(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    u: Float[Tensor, "*batch in"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """The definition: u is the update's own input (x after dropout), or None where it is x."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x if u is None else u, A), B)


def low_rank_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    u: Float[Tensor, "*batch in"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """As `reference`, fused. The update is computed in x's dtype; A and B may be stored wider (float32 under a bfloat16 base)."""
    if torch.compiler.is_compiling() or not _fused:
        A, B = _cast(x, A, B)
        return reference(x, weight, bias, A, B, u)
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        A, B = _cast(x, A, B)
        return _LowRankLinear.apply(x, weight, bias, A, B, u)
    dtype = torch.get_autocast_dtype(device)
    x, weight, A, B = x.to(dtype), weight.to(dtype), A.to(dtype), B.to(dtype)
    bias, u = None if bias is None else bias.to(dtype), None if u is None else u.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LowRankLinear.apply(x, weight, bias, A, B, u)


def _cast(x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A.to(x.dtype), B.to(x.dtype)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, u: Tensor | None
    ) -> Tensor:
        own = u is not None
        u = x if u is None else u
        y = F.linear(x, weight, bias)
        h = F.linear(u, A)
        _rows(y).addmm_(_rows(h), B.t())
        ctx.own = own
        ctx.has_bias = bias is not None
        ctx.shape = u.shape
        _, needs_weight, _, needs_A, needs_B, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            u if needs_A or (needs_weight and not own) else None,
            h if needs_B else None,
            weight,
            A,
            B,
            x if own and needs_weight else None,
        )
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused low-rank layer has no second derivative (backward was called with create_graph=True); "
                "run the model inside `with loratory.ops.low_rank.unfused():` where you need one"
            )
        u, h, weight, A, B, x = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_u = ctx.needs_input_grad
        g2 = _rows(g)
        dx = dweight = dbias = dA = dB = du = None
        gB = g2 @ B  # tokens x rank
        if needs_A:
            dA = gB.t() @ _rows(u)
        if needs_B:
            dB = g2.t() @ _rows(h)
        if needs_x:
            dx = g2 @ weight
            if not ctx.own:
                dx.addmm_(gB, A)
            dx = dx.view(ctx.shape)
        if ctx.own and needs_u:
            du = (gB @ A).view(ctx.shape)
        if needs_weight:
            dweight = g2.t() @ _rows(u if x is None else x)
        if ctx.has_bias and needs_bias:
            dbias = g2.sum(0)
        return dx, dweight, dbias, dA, dB, du


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
