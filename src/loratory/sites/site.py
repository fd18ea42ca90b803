"""A site: one layer of the user's model shown as a matrix W of shape (*stack, out, in).

Conv groups and experts are leading batch dimensions, so `B @ A` or an SVD serves them without an extra line.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Site(ABC):
    """A layer as a matrix. `read` and `write` move its weight, `apply`, `down` and `up` run products in its own geometry."""

    kind: ClassVar[str]
    one_hot: ClassVar[bool] = False  # the input holds indices, so x W^T is a look-up
    called: ClassVar[bool] = True  # the module's forward is the product; else code reads the weight
    can_drop: ClassVar[bool] = True  # dropout can apply to its input
    rounds: ClassVar[bool] = False  # the weight is stored quantised: reading unpacks it, writing rounds it

    def __init__(self, name: str, module: nn.Module, generator: torch.Generator | None = None) -> None:
        self.name = name
        self.module: Any = module
        self.generator = generator
        self.together: Mapping[str, Site] = {}  # all sites of the adapter, while the method makes its start
        self.seen: Any = None  # what `collect` gathered of this layer, by name, while the method makes its start
        self.measured: dict[str, float] = {}  # figures of a method's start, for the summary

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """(*stack, out, in)"""

    def read(self) -> Float[Tensor, "*stack out in"]:
        """The weight as (*stack, out, in)."""
        return self.as_matrix(self.weight)

    @abstractmethod
    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        """Store W (*stack, out, in) into the layer's weight, in place."""

    def stored(self, W: Float[Tensor, "*stack out in"]) -> Tensor:
        """W in the shape of the layer's own parameter."""
        return W.reshape(self.weight.shape)

    def as_matrix(self, stored: Tensor) -> Float[Tensor, "*stack out in"]:
        """A tensor in the shape of the layer's own parameter as (*stack, out, in): `stored`, turned round."""
        return stored.reshape(self.shape)

    @abstractmethod
    def apply(self, x: Tensor, W: Float[Tensor, "*stack out in"]) -> Tensor:
        """The layer's output for the weight W, without its bias."""

    @abstractmethod
    def down(self, x: Tensor, A: Float[Tensor, "*stack rank in"]) -> Tensor:
        """x A^T in the layer's geometry; A (*stack, rank, in)."""

    @abstractmethod
    def up(self, h: Tensor, B: Float[Tensor, "*stack out rank"]) -> Tensor:
        """h B^T in the layer's geometry; B (*stack, out, rank)."""

    @property
    def own_forward(self) -> Callable[[Tensor], Tensor] | None:
        """What runs in place of the layer's own forward, where that would keep more for the backward pass than it must."""
        return None

    def product(self, x: Tensor) -> Tensor:
        """The layer's output for its own weight, without its bias."""
        return self.apply(x, self.read())

    def finite(self) -> Float[Tensor, "*stack out in"]:
        """W as `read` gives it, for a decomposition. Raises ValueError where it holds numbers that have none."""
        W = self.read().detach()
        if not W.is_meta and not bool(torch.isfinite(W).all()):
            raise ValueError(
                f"layer '{self.name}' has a weight with numbers that are not finite, so it cannot be decomposed; load the base again, or "
                "leave the layer out with exclude="
            )
        return W

    def input_gradient(self, g: Tensor, x: Tensor, W: Float[Tensor, "*stack out in"]) -> Tensor:
        """The gradient of x, where g is that of apply(x, W)."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.apply(leaf, W.detach()), leaf, g)[0]

    def weight_gradient(
        self, g: Tensor, x: Tensor, W: Float[Tensor, "*stack out in"] | None = None
    ) -> Float[Tensor, "*stack out in"]:
        """The gradient of W (which it does not depend on), where g is that of apply(x, W)."""
        with torch.enable_grad():
            leaf = (self.read() if W is None else W).detach().to(g.dtype).requires_grad_()
            return torch.autograd.grad(self.apply(x.detach(), leaf), leaf, g)[0]

    def snapshot(self) -> Tensor:
        """The stored weight, bit for bit, as one tensor that `restore` takes."""
        return self.read().detach().clone()

    def restore(self, kept: Tensor) -> None:
        """Put a snapshot back."""
        self.write(kept)

    def read_snapshot(self, kept: Tensor) -> Float[Tensor, "*stack out in"]:
        """The weight a snapshot holds, as `read` would give it."""
        return kept

    def numbers(self, places: Int[Tensor, " k"]) -> Tensor:
        """The weight's numbers at some places, flat in (*stack, out, in)."""
        memory, at = _in_memory(self.read().detach(), places)
        return memory.index_select(0, at)

    def put(self, places: Int[Tensor, " k"], numbers: Tensor) -> None:
        """Write numbers at different places, and leave all others."""
        W = self.read().detach()
        memory, at = _in_memory(W, places)
        memory.scatter_(0, at, numbers)
        if W.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr():  # read gave a copy
            self.write(W)

    def along_out(self, v: Float[Tensor, "*stack out"]) -> Tensor:
        """v (*stack, out), shaped to be multiplied with the layer's output."""
        return v

    def run(self, x: Tensor) -> Tensor:
        """What the model gets for an input x, adapters included."""
        return self.module(x)

    def drop(self, x: Tensor, p: float, training: bool) -> Tensor:
        """Dropout on an input of the layer."""
        return F.dropout(x, p, training)

    def low_rank(
        self,
        x: Tensor,
        base: Callable[[Tensor], Tensor],
        A: Float[Tensor, "*stack rank in"],
        B: Float[Tensor, "*stack out rank"],
        u: Tensor | None,
        scale: float = 1.0,
    ) -> Tensor:
        """base(x) + scale (u A^T) B^T with u = x where it is None."""
        y = base(x)
        dtype = self.compute_dtype(x)
        h = self.down(x if u is None else u, A.to(dtype))
        return y + self.up(h if scale == 1 else scale * h, B.to(dtype))

    def low_rank_rows(
        self,
        x: Tensor,
        A: Float[Tensor, "adapters *stack rank in"],
        B: Float[Tensor, "adapters *stack out rank"],
        which: Int[Tensor, " rows"],
    ) -> Tensor:
        """(x A^T) B^T with factors of each batch row's own: row i of x has A[which[i]] and B[which[i]].

        This definition runs row by row; a site that can takes all rows in one product.
        """
        each = [self.up(self.down(x[i : i + 1], A[k]), B[k]) for i, k in enumerate(which.tolist())]
        return torch.cat(each)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return x.dtype if x.is_floating_point() else self.dtype

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def weight_name(self) -> str:
        """The weight's name in the model."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight as it is stored."""
        return self.weight.numel() * self.weight.element_size()

    @property
    def stack(self) -> tuple[int, ...]:
        return self.shape[:-2]

    @property
    def outputs(self) -> int:
        return self.shape[-2]

    @property
    def inputs(self) -> int:
        return self.shape[-1]

    def rank(self, asked: int | None, default: int) -> int:
        """The rank for this layer: the one asked for, which must fit, or the default capped at min(in, out)."""
        most = min(self.outputs, self.inputs)
        if asked is None:
            return min(default, most)
        entries = "groups" if self.kind == "conv" else "entries"
        if asked > most:
            raise ValueError(
                f"layer '{self.name}' has {self.inputs} inputs and {self.outputs} outputs"
                f"{f' in each of {self.stack[0]} {entries}' if self.stack else ''}, so rank {asked} is too large (at most {most}); "
                "lower rank, set it for this layer with per_layer=, or leave the layer out with exclude="
            )
        return asked

    def full_bias(self, y: Tensor) -> Tensor | None:
        """The bias shaped to be added to an output, or None."""
        if self.bias is None:
            return None
        return self.along_out(self.bias.reshape(*self.stack, self.outputs)).to(y.dtype)

    def with_bias(self, y: Tensor) -> Tensor:
        """An output that is a bare product, with the bias where the layer has one."""
        bias = self.full_bias(y)
        return y if bias is None else y + bias


def _in_memory(W: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """W's memory as one line, and where places of W, counted in the order of its axes, lie on it."""
    if W.is_contiguous():
        return W.view(-1), places
    span = 1 + sum((n - 1) * step for n, step in zip(W.shape, W.stride(), strict=True))
    at = sum(i * step for i, step in zip(torch.unravel_index(places, W.shape), W.stride(), strict=True))
    return W.as_strided((span,), (1,)), at  # type: ignore[return-value]
