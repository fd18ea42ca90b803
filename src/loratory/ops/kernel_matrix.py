"""Sparse updates from distances: a kernel matrix between points of the inputs and points of the outputs, its small entries set to 0.

    K[i, o] = sum_h c_h |P_h[i] - Q_h[o]|_norm          distance
    K + alpha softmax_o(K / gamma) + beta               mix
    K[i, o] = sum_h P_h[i] . Q_h[o]                     linear
    D[o, i] = K g,  g = |K| where |K| > tau, else 0     hard: tau is the s-quantile of |K|, and g a constant for the gradient
    D[o, i] = K max(|K| - tau, 0)                       soft: the same
    P: (*stack, heads, in, width)   Q: (*stack, heads, out, width)   c: (heads)   alpha, gamma, beta, s: (*stack, 1)

D is one tensor; everything else lies in blocks of its columns. In a kernel with distances K has to be made again in the backward pass,
which needs the gradient of D and blocks, and no D.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loratory.ops.recomputed_delta import Delta

LEAST, PARTS = 1 << 16, 16  # a block has a 16th of the numbers of D, and no fewer than 65,536
UNIT = 24  # a share is counted in 2^-24: places in a matrix are integers, without the rounding of a product of floats


class Rule(NamedTuple):
    """How a matrix is made from the points."""

    kernel: Literal["mix", "distance", "linear"]
    norm: Literal[1, 2]
    threshold: Literal["hard", "soft", "none"]


def kernel_matrix(
    P: Float[Tensor, "*stack heads rows width"],
    Q: Float[Tensor, "*stack heads out width"],
    c: Float[Tensor, " heads"],
    mixing: Sequence[Tensor],
    rule: Rule,
) -> Float[Tensor, "*stack rows out"]:
    """K, dense."""
    if rule.kernel == "linear":
        return (P @ Q.mT).sum(-3)
    d = torch.cdist(P, Q, p=float(rule.norm), compute_mode="donot_use_mm_for_euclid_dist")
    K = (c.reshape(-1, 1, 1) * d).sum(-3)
    if rule.kernel == "distance":
        return K
    alpha, gamma, beta = (m.unsqueeze(-1) for m in mixing)
    return K + alpha * torch.softmax(K / gamma, -1) + beta


def _places(s: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the s-quantile among `count` ordered numbers: the place below, the place above, and the way between them."""
    at = (s * (1 << UNIT)).round().long() * (count - 1)
    low = at >> UNIT
    return low, (low + 1).clamp(max=count - 1), (at & ((1 << UNIT) - 1)).to(s.dtype) / (1 << UNIT)


def reference_size_quantile(
    K: Float[Tensor, "*stack rows columns"], s: Float[Tensor, "*stack 1"]
) -> Float[Tensor, "*stack 1"]:
    """The s-quantile of |K| with linear interpolation, by its definition."""
    sizes = K.abs().flatten(-2).sort(-1).values
    low, high, way = _places(s, sizes.shape[-1])
    return torch.lerp(sizes.gather(-1, low), sizes.gather(-1, high), way.to(K.dtype))


def size_quantile(K: Float[Tensor, "*stack rows columns"], s: Float[Tensor, "*stack 1"]) -> Float[Tensor, "*stack 1"]:
    """The same, with one block beside K: bits of the number at a place are found from the top, by counting smaller numbers."""
    width = _width(K.shape[-2:].numel(), K.shape[:-2].numel())
    if width >= K.shape[-2:].numel():
        return reference_size_quantile(K, s)
    whole, bits = (torch.int64, 63) if K.dtype == torch.float64 else (torch.int32, 31)  # sizes order as their bits do
    pieces = K.contiguous().view(whole).flatten(-2).split(width, -1)

    def sizes() -> Iterator[Tensor]:
        return (piece & ((1 << bits) - 1) for piece in pieces)

    def below(number: Int[Tensor, "*stack 1"]) -> Int[Tensor, "*stack 1"]:
        return torch.stack([(size < number).sum(-1, keepdim=True) for size in sizes()]).sum(0)

    low, high, way = _places(s, K.shape[-2:].numel())
    first = torch.zeros_like(low, dtype=whole)
    for bit in reversed(range(bits)):
        larger = first | (1 << bit)
        first = torch.where(below(larger) <= low, larger, first)
    past = torch.iinfo(whole).max
    after = torch.stack([torch.where(size > first, size, past).amin(-1, keepdim=True) for size in sizes()]).amin(0)
    second = torch.where(below(first + 1) > high, first, after)
    return torch.lerp(first.view(K.dtype), second.view(K.dtype), way.to(K.dtype))


def gain(K: Float[Tensor, "*stack rows out"], tau: Tensor | None, rule: Rule) -> Tensor | None:
    """What K is multiplied with; None: nothing. nan stays nan."""
    if tau is None:
        return None
    size = K.detach().abs()
    small = size <= tau.unsqueeze(-1)
    return (size - tau.unsqueeze(-1) if rule.threshold == "soft" else size).masked_fill(small, 0)


def _thinned(K: Tensor, tau: Tensor | None, rule: Rule) -> Tensor:
    g = gain(K, tau, rule)
    return K if g is None else K * g


def reference(
    tensors: Sequence[Tensor],
    c: Tensor,
    s: Tensor,
    rule: Rule,
    start: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Float[Tensor, "*stack out in"]:
    """D by its definition. start: (P, Q, tau) whose update is subtracted."""
    P, Q, *mixing = tensors
    K = kernel_matrix(P, Q, c, mixing, rule)
    D = _thinned(K, None if rule.threshold == "none" else reference_size_quantile(K.detach(), s), rule)
    if start is not None:
        P0, Q0, tau = start
        D = D - _thinned(kernel_matrix(P0, Q0, c, at_start(mixing), rule), tau, rule)
    return D.mT


def at_start(mixing: Sequence[Tensor]) -> list[Tensor]:
    """alpha, gamma and beta before training."""
    return [torch.zeros_like(m) if i == 2 else torch.ones_like(m) for i, m in enumerate(mixing)]


def kernel_delta(c: Tensor, s: Tensor, rule: Rule, start: tuple[Tensor, Tensor, Tensor | None] | None = None) -> Delta:
    """D as a function of its tensors, for one forward pass and its backward pass; for a compiler, which fuses by itself, the definition."""
    if torch.compiler.is_compiling():
        return lambda tensors: reference([_wide(t) for t in tensors], _wide(c), s, rule, start)
    return KernelDelta(c, s, rule, start)


class KernelDelta:
    """D as a function of (P, Q) or (P, Q, alpha, gamma, beta), for one forward pass and its backward pass.

    tau is found once. `pull` gives what D's gradient gives, without D. Second derivatives do not exist.
    """

    def __init__(
        self, c: Tensor, s: Tensor, rule: Rule, start: tuple[Tensor, Tensor, Tensor | None] | None = None
    ) -> None:
        self.c, self.s, self.rule, self.start = c, s, rule, start
        self.tau: Tensor | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> Float[Tensor, "*stack out in"]:
        return _Kernel.apply(self, *(_wide(t) for t in tensors))

    def made(self, tensors: Sequence[Tensor]) -> Tensor:
        P, Q, *mixing = tensors
        c, rule = _wide(self.c), self.rule
        D = P.new_empty(*P.shape[:-3], Q.shape[-2], P.shape[-2])
        for columns in _blocks(D):
            D[..., columns] = kernel_matrix(P[..., columns, :], Q, c, mixing, rule).mT
        if rule.threshold != "none" and self.tau is None:
            self.tau = size_quantile(D, self.s)
        if self.tau is None and self.start is None:
            return D
        for columns in _blocks(D):
            part = _thinned(D[..., columns], self.tau, rule)
            if self.start is not None:
                P0, Q0, tau = self.start
                K = kernel_matrix(P0[..., columns, :], Q0, c, at_start(mixing), rule)
                part = part - _thinned(K, tau, rule).mT
            D[..., columns] = part
        return D

    def pull(self, tensors: Sequence[Tensor], dD: Float[Tensor, "*stack out in"]) -> list[Tensor]:
        """The gradients of the tensors. Comes after `made`, which finds tau."""
        P, Q, *mixing = (_wide(t.detach()) for t in tensors)
        c, dP, others = _wide(self.c), torch.empty_like(P), [Q, *mixing]
        sums = [torch.zeros_like(t) for t in others]
        with _full_precision(P.device.type):
            for columns in _blocks(dD):
                with torch.enable_grad():
                    points, *rest = leaves = [t.detach().requires_grad_() for t in (P[..., columns, :], *others)]
                    K = kernel_matrix(points, rest[0], c, rest[1:], self.rule)
                g = gain(K, self.tau, self.rule)
                dK = dD[..., columns].mT.to(K.dtype)
                dP[..., columns, :], *found = torch.autograd.grad(K, leaves, dK if g is None else dK * g)
                for total, part in zip(sums, found, strict=True):
                    total += part
        return [d.to(t.dtype) for d, t in zip((dP, *sums), tensors, strict=True)]


def _width(columns: int, rows: int) -> int:
    """How many columns of so many rows make a block."""
    return max(1, -(-max(LEAST, rows * columns // PARTS) // max(1, rows)))


def _blocks(D: Tensor) -> Iterator[slice]:
    """Slices of the columns of D."""
    columns = D.shape[-1]
    width = _width(columns, D.shape[:-1].numel())
    return (slice(i, min(i + width, columns)) for i in range(0, columns, width))


def _wide(t: Tensor) -> Tensor:
    """In float32 or wider: the distances of near points have no digits in less."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _full_precision(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, update: KernelDelta, *tensors: Tensor) -> Tensor:
        ctx.update = update
        ctx.save_for_backward(*tensors)
        with _full_precision(tensors[0].device.type):
            return update.made(tensors)

    @staticmethod
    def backward(ctx: Any, dD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "an update made from distances has no second derivative (backward was called with create_graph=True)"
            )
        return None, *ctx.update.pull(ctx.saved_tensors, dD)
