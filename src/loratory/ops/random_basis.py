"""sum_i c_i M_i over frozen random matrices M_i, which are made from a key whenever they are needed and dropped.

`reference` is the definition. `combined` is what runs: one operator, opaque to torch.compile, that keeps nothing but the key and c's
shape for the backward pass and holds few of the M_i at a time. Its derivative, the products with the M_i, is an operator of the same kind.

The numbers are a hash of their place: integer arithmetic, so that they are the same bits on every device, in every thread, and for any
number of matrices at a time.
"""

from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

AT_ONCE_CPU, AT_ONCE = (
    2**16,
    2**24,
)  # numbers that exist at a time: what a CPU's cache holds; what keeps other devices busy
GOLDEN, FIRST, SECOND = (
    0x9E3779B1 - 2**32,
    0x7FEB352D,
    0x846CA68B - 2**32,
)  # odd numbers without a pattern in their bits


def uniform(key: Int32[Tensor, "2"], first: int, count: int, size: int) -> Float[Tensor, "count size"]:
    """Numbers in [-1, 1), float32, of the matrices first, ..., first + count - 1 with `size` numbers each."""
    if key.is_meta:
        return torch.empty(count, size, device=key.device)
    places = torch.arange(size, dtype=torch.int32, device=key.device) * GOLDEN
    number = torch.arange(first, first + count, dtype=torch.int32, device=key.device).unsqueeze(-1) * GOLDEN
    own = _mixed(number, key[0], key[1]), _mixed(number, key[1], key[0])
    return ((_mixed(places, *own) >> 8) & 0xFFFFFF).to(torch.float32).mul_(2.0**-23).sub_(1.0)


def _mixed(x: Tensor, before: Tensor, between: Tensor) -> Tensor:
    """Two rounds of shift, exclusive or, and multiply modulo 2^32, with a key before each; >> copies the sign, hence the masks."""
    x = x + before
    x ^= (x >> 16) & 0xFFFF
    x *= FIRST
    x += between
    x ^= (x >> 15) & 0x1FFFF
    x *= SECOND
    x ^= (x >> 16) & 0xFFFF
    return x


def reference(c: Float[Tensor, "*stack k"], key: Int32[Tensor, "2"], size: int) -> Float[Tensor, "*stack size"]:
    """The definition."""
    return c @ uniform(key, 0, c.shape[-1], size).to(c.dtype)


def combined(
    c: Float[Tensor, "*stack k"], key: Int32[Tensor, "2"], size: int, chunks: int | None = None
) -> Float[Tensor, "*stack size"]:
    """As `reference`, in so many chunks, a divisor of k (None: as many as suit the device)."""
    return torch.ops.loratory.combined(c, key, size, chunks or 0)


def kept(c: Float[Tensor, "*stack k"], M: Float[Tensor, "k rows columns"]) -> Float[Tensor, "*stack rows columns"]:
    """The same sum over matrices that are there."""
    with torch.autocast(c.device.type, enabled=False):
        return (c @ M.flatten(1).to(c.dtype)).unflatten(-1, M.shape[1:])


def at_once(k: int, size: int, chunks: int | None, device: str) -> int:
    """How many matrices exist at a time."""
    return k // chunks if chunks else min(k, max(1, (AT_ONCE_CPU if device == "cpu" else AT_ONCE) // size))


def _pieces(k: int, size: int, chunks: int, device: torch.device) -> list[tuple[int, int]]:
    """(first, count) of the matrices made at a time."""
    step = at_once(k, size, chunks, device.type)
    return [(first, min(step, k - first)) for first in range(0, k, step)]


def _combined(c: Tensor, key: Tensor, size: int, chunks: int) -> Tensor:
    rows = c.reshape(-1, c.shape[-1])
    total = rows.new_zeros(rows.shape[0], size)
    with torch.autocast(c.device.type, enabled=False):
        for first, count in _pieces(c.shape[-1], size, chunks, c.device):
            total.addmm_(rows[:, first : first + count], uniform(key, first, count, size).to(c.dtype))
    return total.reshape(*c.shape[:-1], size)


def _products(g: Tensor, key: Tensor, k: int, chunks: int) -> Tensor:
    """<g, M_i> for each i."""
    rows, size = g.reshape(-1, g.shape[-1]), g.shape[-1]
    found = rows.new_empty(rows.shape[0], k)
    with torch.autocast(g.device.type, enabled=False):
        for first, count in _pieces(k, size, chunks, g.device):
            M = uniform(key, first, count, size).to(g.dtype)
            torch.mm(rows, M.t(), out=found[:, first : first + count])
    return found.reshape(*g.shape[:-1], k)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    t, key, _, ctx.chunks = inputs
    ctx.width = t.shape[-1]
    ctx.save_for_backward(key)


def _define(name: str, other: str, run: Any) -> None:
    """An operator (t, key, size, chunks) -> (*stack, size), linear in t, whose derivative is the other one."""
    _LIBRARY.define(f"{name}(Tensor t, Tensor key, int size, int chunks) -> Tensor")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, lambda t, key, size, chunks: t.new_empty(*t.shape[:-1], size), "Meta")

    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (key,) = ctx.saved_tensors
        return getattr(torch.ops.loratory, other)(g, key, ctx.width, ctx.chunks), None, None, None

    torch.library.register_autograd(f"loratory::{name}", backward, setup_context=_keep, lib=_LIBRARY)


_LIBRARY = torch.library.Library("loratory", "DEF")
_define("combined", "products", _combined)
_define("products", "combined", _products)
