"""Linear layers: torch.nn.Linear and transformers' Conv1D, which stores its weight transposed."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from loratory.ops.low_rank import CAST_AGAIN, low_rank_linear
from loratory.sites.site import Site


class LinearSite(Site):
    """torch.nn.Linear: W is its weight (out, in)."""

    kind = "linear"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def as_matrix(self, stored: Tensor) -> Float[Tensor, "*stack out in"]:
        return stored

    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        with torch.no_grad():
            self.weight.copy_(W)

    def apply(self, x: Tensor, W: Float[Tensor, "*stack out in"]) -> Tensor:
        return F.linear(x, W.to(x.dtype))

    def input_gradient(self, g: Tensor, x: Tensor, W: Float[Tensor, "*stack out in"]) -> Tensor:
        return g @ W.to(g.dtype)

    def weight_gradient(self, g: Tensor, x: Tensor, W: Tensor | None = None) -> Float[Tensor, "*stack out in"]:
        return g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1])

    def down(self, x: Tensor, A: Float[Tensor, "*stack rank in"]) -> Tensor:
        return F.linear(x, A)

    def up(self, h: Tensor, B: Float[Tensor, "*stack out rank"]) -> Tensor:
        return F.linear(h, B)

    def low_rank(
        self,
        x: Tensor,
        base: Callable[[Tensor], Tensor],
        A: Float[Tensor, "*stack rank in"],
        B: Float[Tensor, "*stack out rank"],
        u: Tensor | None,
        scale: float = 1.0,
    ) -> Tensor:
        if (
            type(self.module).__mro__[1] is nn.Linear
        ):  # the adapted class stands directly on nn.Linear: its forward is known
            again = CAST_AGAIN in self.module.__dict__
            return low_rank_linear(x, self.module.weight, self.module.bias, A, B, u, scale, again)
        return super().low_rank(x, base, A, B, u, scale)

    def low_rank_rows(
        self,
        x: Tensor,
        A: Float[Tensor, "adapters *stack rank in"],
        B: Float[Tensor, "adapters *stack out rank"],
        which: Int[Tensor, " rows"],
    ) -> Tensor:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])  # rows x tokens x in
        y = torch.bmm(torch.bmm(tokens, A[which].mT), B[which].mT)
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Conv1DSite(LinearSite):
    """transformers' Conv1D (GPT-2): W is its weight (in, out) transposed."""

    kind = "conv1d-transposed"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[::-1])

    def as_matrix(self, stored: Tensor) -> Float[Tensor, "*stack out in"]:
        return stored.t()

    def stored(self, W: Float[Tensor, "*stack out in"]) -> Tensor:
        return W.t()

    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        super().write(W.t())
