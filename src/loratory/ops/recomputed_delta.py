"""y = x (W + D)^T for an update D made from a few trained tensors: D is made for the product, dropped, and made again in the backward pass.

Autograd alone would keep W + D of every layer from the forward to the backward pass. Here one tensor of that size lives at a time in the
forward pass, and in the backward pass after dx: dx first, then D's gradient, then what it gives for the tensors. For that D is made once
more beside its gradient, unless `delta.pull(tensors, dD)` gives the gradients of the tensors without it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Layer(Protocol):
    """What of a site is needed."""

    def read(self) -> Tensor: ...

    def apply(self, x: Tensor, W: Tensor) -> Tensor: ...

    def input_gradient(self, g: Tensor, x: Tensor, W: Tensor) -> Tensor: ...

    def weight_gradient(self, g: Tensor, x: Tensor, W: Tensor | None) -> Tensor: ...

    def with_bias(self, y: Tensor) -> Tensor: ...


Delta = Callable[[Sequence[Tensor]], Tensor]


def reference(x: Tensor, site: Layer, delta: Delta, tensors: Sequence[Tensor], *, alone: bool = False) -> Tensor:
    """The definition. alone: the product with D, without W."""
    return site.apply(x, delta(tensors) if alone else site.read() + delta(tensors))


def recomputed_delta(x: Tensor, site: Layer, delta: Delta, tensors: Sequence[Tensor], *, alone: bool = False) -> Tensor:
    """As `reference`, keeping x and the tensors alone. W gets no gradient."""
    if torch.compiler.is_compiling():
        return reference(x, site, delta, tensors, alone=alone)
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return _RecomputedDelta.apply(x, site, delta, alone, *tensors)
    x = x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() else x
    with torch.autocast(device, enabled=False):
        return _RecomputedDelta.apply(x, site, delta, alone, *tensors)


def with_delta(
    x: Tensor,
    u: Tensor,
    base: Callable[[Tensor], Tensor],
    site: Layer,
    delta: Delta,
    tensors: Sequence[Tensor],
    *,
    keep: bool = False,
) -> Tensor:
    """base(x) + D u; where u is x itself, in one product with W + D. keep: autograd keeps D, and so has a second derivative."""
    product = reference if keep else recomputed_delta
    if u is x:
        return site.with_bias(product(x, site, delta, tensors))
    return base(x) + product(u, site, delta, tensors, alone=True)


def _whole(site: Layer, delta: Delta, tensors: Sequence[Tensor], alone: bool) -> Tensor:
    """W + D, in D's own memory where that is nobody else's; or D alone."""
    D = delta(tensors)
    if alone:
        return D
    W = site.read()
    own = not (D._is_view() or any(D is t for t in tensors)) and D.dtype == torch.promote_types(D.dtype, W.dtype)
    return D.add_(W) if own else W + D


class _RecomputedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, site: Layer, delta: Delta, alone: bool, *tensors: Tensor) -> Tensor:
        ctx.site, ctx.delta, ctx.alone = site, delta, alone
        ctx.save_for_backward(x, *tensors)
        return site.apply(x, _whole(site, delta, tensors, alone))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a layer whose update is recomputed has no second derivative (backward was called with create_graph=True); give "
                "cache_delta=True where you need one"
            )
        site: Layer = ctx.site
        x, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        dx = site.input_gradient(g, x, _whole(site, ctx.delta, tensors, ctx.alone)) if ctx.needs_input_grad[0] else None
        if not any(wanted):
            return dx, None, None, None, *(None for _ in tensors)
        dD = site.weight_gradient(g, x, None)
        if (pull := getattr(ctx.delta, "pull", None)) is not None:
            pulled = pull(tensors, dD)
            return dx, None, None, None, *(d if need else None for d, need in zip(pulled, wanted, strict=True))
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)]
            D = ctx.delta(leaves)
            found = iter(
                torch.autograd.grad(D, [t for t in leaves if t.requires_grad], dD.to(D.dtype), allow_unused=True)
            )
        return dx, None, None, None, *(next(found) if need else None for need in wanted)
