"""y = f(x_1, x_2, ...) for a cheap f (a norm, an activation, a gated product): the x are kept for the backward pass, and y is made again.

Autograd alone keeps what f's own operations need, and every layer that takes y as its input keeps y. Here f is run again in the
backward pass, and a layer of ours that needs y there keeps what `origin(y)` tells in its place. `product` does so for a matrix as large as a weight.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SECOND = (
    "what is made again in the backward pass has no second derivative (backward was called with create_graph=True); where you need one, "
    "call close() on what loratory.lean_activations gave, or take a method that keeps its factors"
)
ORIGIN = "_loratory_origin"  # attribute of y
Cheap = Callable[..., Tensor]


class Recipe(NamedTuple):
    """How a tensor is made again. A node of autograd keeps this, and the inputs where autograd frees them after use."""

    f: Cheap
    autocast: tuple[str, torch.dtype, bool]  # device, dtype, whether on: as in the forward pass

    def make(self, inputs: tuple[Tensor, ...]) -> Tensor:
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return self.f(*inputs)


class Origin(NamedTuple):
    """What a tensor can be made again from."""

    recipe: Recipe
    inputs: tuple[Tensor, ...]


def reference(f: Cheap, *inputs: Tensor) -> Tensor:
    """The definition."""
    return f(*inputs)


def made_again(f: Cheap, *inputs: Tensor) -> Tensor:
    """As `reference`, keeping the inputs alone. f is deterministic, gets trained tensors as inputs and changes none."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return f(*inputs)
    device = inputs[0].device.type
    autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    recipe = Recipe(f, autocast)
    y: Tensor = _MadeAgain.apply(recipe, *inputs)
    setattr(y, ORIGIN, Origin(recipe, tuple(x.detach() for x in inputs)))
    return y


def product(
    x: Float[Tensor, "*batch in"], M: Float[Tensor, "out in"], make: Callable[[], Tensor], tensors: Sequence[Tensor]
) -> Float[Tensor, "*batch out"]:
    """x M^T, keeping x alone: `make()` gives M's numbers once more, from tensors that no one may have changed until then."""
    if torch.compiler.is_compiling():
        return F.linear(x, M)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, M = x.to(dtype), M.to(dtype)
    with torch.autocast(device, enabled=False):
        return _Product.apply(x, M, make, *tensors)


def origin(y: Tensor) -> Origin | None:
    """What y can be made again from, or None."""
    return getattr(y, ORIGIN, None)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, M: Tensor, make: Callable[[], Tensor], *tensors: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, *tensors)
        return F.linear(x, M)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND)
        x, *tensors = ctx.saved_tensors  # an error of autograd's where one was changed
        dx = g @ ctx.make().to(g.dtype) if ctx.needs_input_grad[0] else None
        dM = g.reshape(-1, g.shape[-1]).t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return dx, dM, None, *(None for _ in tensors)


class _MadeAgain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, *inputs: Tensor) -> Tensor:
        ctx.recipe = recipe
        ctx.save_for_backward(*inputs)
        return recipe.f(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND)
        wanted = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, wanted, strict=True)]
            y = ctx.recipe.make(tuple(leaves))
        found = iter(torch.autograd.grad(y, [x for x in leaves if x.requires_grad], g))
        return None, *(next(found) if need else None for need in wanted)
