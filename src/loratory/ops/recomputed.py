"""y = x W^T + bias for a frozen W that is stored packed: read for the product, dropped, and read again in the backward pass.

Without this, autograd keeps every unpacked W from the forward to the backward pass: the whole model in full precision.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

MOST = 1 << 22  # numbers of W unpacked at a time: an output head is worked through in pieces

Read = Callable[[slice], Tensor]  # rows of W (rows, in)


def reference(
    x: Float[Tensor, "*batch in"], read: Read, bias: Float[Tensor, " out"] | None, outputs: int
) -> Float[Tensor, "*batch out"]:
    """The definition."""
    return F.linear(x, read(slice(0, outputs)).to(x.dtype), bias)


def recomputed_linear(
    x: Float[Tensor, "*batch in"], read: Read, bias: Float[Tensor, " out"] | None, outputs: int
) -> Float[Tensor, "*batch out"]:
    """As `reference`, with no more than MOST numbers of W (at least one row) at a time, and none kept. W gets no gradient."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        y = _RecomputedLinear.apply(x.to(dtype), read, outputs)
    return y if bias is None else y + bias.to(dtype)


def _pieces(outputs: int, inputs: int) -> list[slice]:
    rows = max(1, MOST // max(1, inputs))
    return [slice(i, min(i + rows, outputs)) for i in range(0, outputs, rows)]


class _RecomputedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Read, outputs: int) -> Tensor:
        ctx.read, ctx.outputs, ctx.inputs = read, outputs, x.shape[-1]
        pieces = _pieces(outputs, x.shape[-1])
        if len(pieces) == 1:
            return F.linear(x, read(pieces[0]).to(x.dtype))
        y = x.new_empty(*x.shape[:-1], outputs)
        for rows in pieces:
            y[..., rows] = F.linear(x, read(rows).to(x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None, None
        first, *rest = _pieces(ctx.outputs, ctx.inputs)
        dx = g[..., first] @ ctx.read(first).to(g.dtype)
        for rows in rest:
            dx = dx + g[..., rows] @ ctx.read(rows).to(g.dtype)
        return dx, None, None
