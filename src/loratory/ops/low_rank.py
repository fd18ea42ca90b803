"""y = x W^T + bias + (u A^T) B^T: frozen linear layers with low-rank updates, as one autograd node for all that share x.

`reference` is the definition. `low_rank_linears` is what runs: in eager mode one autograd function that takes the products with all A
as one, adds each update into its base product in place, forward and backward, adds up the gradient of x in one tensor, and keeps
the weights, u where an A is trained (or what u can be made again from), and u A^T where a B is; under torch.compile the definition
itself, which the compiler fuses on its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from loratory.ops.made_again import Origin, origin

CAST_AGAIN = "_loratory_cast_again"  # mark of a module whose weight autocast narrows again in the backward pass
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


def is_fused() -> bool:
    """Whether the fused function runs here."""
    return _fused and not torch.compiler.is_compiling()


class Member(NamedTuple):
    """One of the layers that share x."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None
    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float = 1.0
    cast_again: bool = False  # under autocast: the weight is narrowed a second time instead of being kept narrow


def reference(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    u: Float[Tensor, "*batch in"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "*batch out"]:
    """The definition: u is the update's own input (x after dropout), or None where it is x."""
    h = F.linear(x if u is None else u, A)
    return F.linear(x, weight, bias) + F.linear(h if scale == 1 else scale * h, B)


def low_rank_linear(
    x: Float[Tensor, "*batch in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    A: Float[Tensor, "rank in"],
    B: Float[Tensor, "out rank"],
    u: Float[Tensor, "*batch in"] | None = None,
    scale: float = 1.0,
    cast_again: bool = False,
) -> Float[Tensor, "*batch out"]:
    """As `reference`, fused. The update is computed in x's dtype; A and B may be stored wider (float32 under a bfloat16 base)."""
    return low_rank_linears(x, [Member(weight, bias, A, B, scale, cast_again)], u)[0]


def low_rank_linears(x: Tensor, members: Sequence[Member], u: Tensor | None = None) -> tuple[Tensor, ...]:
    """`low_rank_linear` of several layers that share x and u: y (*batch, out) of each."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    if not is_fused():
        if not autocast:
            members = [m._replace(A=m.A.to(x.dtype), B=m.B.to(x.dtype)) for m in members]
        return tuple(reference(x, m.weight, m.bias, m.A, m.B, u, m.scale) for m in members)
    source = None if u is not None else origin(x)
    scales = [m.scale for m in members]
    if not autocast:
        return _LowRankLinears.apply(source, scales, x, u, *_flat(members, x.dtype))
    dtype = torch.get_autocast_dtype(device)
    x, u = x.to(dtype), None if u is None else u.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LowRankLinears.apply(source, scales, x, u, *_flat(members, dtype))


def _flat(members: Sequence[Member], dtype: torch.dtype) -> list[Tensor | None]:
    """Weights, biases, A and B. A weight that is to be cast again stays as it is: what is made of it here is kept."""
    return [
        t
        for m in members
        for t in (
            m.weight if m.cast_again else m.weight.to(dtype),
            None if m.bias is None else m.bias.to(dtype),
            m.A.to(dtype),
            m.B.to(dtype),
        )
    ]


class _LowRankLinears(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, source: Origin | None, scales: list[float], x: Tensor, u: Tensor | None, *flat: Any
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        weights, biases, As, Bs = (flat[i::4] for i in range(4))
        needs_weight, needs_A, needs_B = (any(ctx.needs_input_grad[4 + i :: 4]) for i in (0, 2, 3))
        own = u is not None
        u = x if u is None else u
        h = F.linear(u, _stacked(As))
        outputs = []
        for W, bias, B, part, s in zip(weights, biases, Bs, _parts(h, As), scales, strict=True):
            W = W.to(x.dtype)
            y = x.new_empty(*x.shape[:-1], len(W))  # no view, so that a model may write into it (nn.ReLU(inplace=True))
            rows = y.view(-1, len(W))
            if bias is None:
                torch.mm(_rows(x), W.t(), out=rows)
            else:
                torch.addmm(bias, _rows(x), W.t(), out=rows)
            rows.addmm_(_rows(part), B.t(), alpha=s)
            outputs.append(y)
        keeps_u = needs_A or (needs_weight and not own)
        ctx.own, ctx.shape, ctx.dtype, ctx.scales = own, x.shape, x.dtype, scales
        ctx.recipe = source.recipe if keeps_u and source is not None else None
        kept = (u,) if source is None else source.inputs
        keeps_W = needs_weight or ctx.needs_input_grad[2]
        ctx.save_for_backward(
            h if needs_B else None,
            x if own and needs_weight else None,
            *(weights if keeps_W else [None] * len(As)),
            *As,
            *Bs,
            *(kept if keeps_u else ()),
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused low-rank layer has no second derivative (backward was called with create_graph=True); "
                "run the model inside `with loratory.ops.low_rank.unfused():` where you need one"
            )
        h, x, *rest = ctx.saved_tensors
        scales, n = ctx.scales, len(ctx.scales)
        weights, As, Bs, kept = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], tuple(rest[3 * n :])
        _, _, needs_x, needs_u, *needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * (4 * n)
        dx = du = None
        gs: list[Any] = [None if g is None else _rows(g) for g in gradients]
        here = [i for i in range(n) if gs[i] is not None]
        if not here:
            return (None, None, None, None, *found)
        gB = torch.cat([_times(gs[i] @ Bs[i], scales[i]) for i in here], 1)  # tokens x ranks
        A = _stacked([As[i] for i in here])
        if needs_x:
            for i in here:
                W = weights[i].to(ctx.dtype)
                dx = gs[i] @ W if dx is None else dx.addmm_(gs[i], W)
            assert dx is not None
            dx = (dx if ctx.own else dx.addmm_(gB, A)).view(ctx.shape)
        if ctx.own and needs_u:
            du = (gB @ A).view(ctx.shape)
        if kept:
            u = _rows(kept[0] if ctx.recipe is None else ctx.recipe.make(kept).to(ctx.dtype))
            dA = _parts(gB.t() @ u, [As[i] for i in here], 0) if any(needs[2::4]) else ()
            for i, d in zip(here, dA, strict=False):
                found[4 * i + 2] = d if needs[4 * i + 2] else None
        parts: Sequence[Any] = [None] * n if h is None else _parts(h, As)
        for i in here:
            g = gs[i]
            if needs[4 * i]:
                found[4 * i] = (g.t() @ (u if x is None else _rows(x))).to(weights[i].dtype)
            if needs[4 * i + 1]:
                found[4 * i + 1] = g.sum(0)
            if needs[4 * i + 3]:
                found[4 * i + 3] = _times(g.t() @ _rows(parts[i]), scales[i])
        return None, None, dx, du, *found


def _stacked(As: Sequence[Tensor]) -> Tensor:
    """All A as one (ranks, in)."""
    return As[0] if len(As) == 1 else torch.cat(tuple(As))


def _parts(h: Tensor, As: Sequence[Tensor], dim: int = -1) -> Sequence[Tensor]:
    """Each layer's own part of what was made with all A."""
    return (h,) if len(As) == 1 else h.split([len(A) for A in As], dim)


def _times(x: Tensor, s: float) -> Tensor:
    """s x, in x's own memory."""
    return x if s == 1 else x.mul_(s)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
