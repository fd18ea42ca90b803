"""y = x W^T + bias for a frozen W that is stored packed: read for the product, dropped, and read again in the backward pass.

Without this, autograd keeps every unpacked W from the forward to the backward pass: the whole model in full precision.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

MOST = 1 << 22  # numbers of W unpacked at a time: an output head is worked through in pieces

Read = Callable[[slice], Tensor]  # rows of W (rows, in)


_tell: Callable[[int], None] | None = None


@contextmanager
def sampled(tell: Callable[[int], None]) -> Iterator[None]:
    """Work through the first and the last piece of each product alone, and tell before each how many it stands for.

    The result is wrong, the memory is right: for plans, which run without data.
    """
    global _tell
    before, _tell = _tell, tell
    try:
        yield
    finally:
        _tell = before


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


def _worked(pieces: list[slice]) -> Iterator[slice]:
    """The pieces to work through: all, but for a plan."""
    if _tell is None or len(pieces) < 3:
        yield from pieces
        return
    _tell(len(pieces) - 1)
    yield pieces[0]
    _tell(1)
    yield pieces[-1]


class _RecomputedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Read, outputs: int) -> Tensor:
        ctx.read, ctx.outputs, ctx.inputs = read, outputs, x.shape[-1]
        pieces = _pieces(outputs, x.shape[-1])
        if len(pieces) == 1:
            return F.linear(x, read(pieces[0]).to(x.dtype))
        y = x.new_empty(*x.shape[:-1], outputs)
        for rows in _worked(pieces):
            y[..., rows] = F.linear(x, read(rows).to(x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx = None
        for rows in _worked(_pieces(ctx.outputs, ctx.inputs)):
            part = g[..., rows] @ ctx.read(rows).to(g.dtype)
            dx = part if dx is None else dx + part
        return dx, None, None
