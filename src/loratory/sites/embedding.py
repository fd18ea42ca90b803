"""Embedding tables: W (dim, vocab) is the table transposed, applied to one-hot columns by look-up."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from loratory.sites.site import Site


class EmbeddingSite(Site):
    """torch.nn.Embedding, and subclasses that multiply its output by `embed_scale` (Gemma, BART)."""

    kind = "embedding"
    one_hot = True
    can_drop = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[::-1])

    def as_matrix(self, stored: Tensor) -> Float[Tensor, "*stack out in"]:
        return stored.t()

    def stored(self, W: Float[Tensor, "*stack out in"]) -> Tensor:
        return W.t()

    def write(self, W: Float[Tensor, "*stack out in"]) -> None:
        with torch.no_grad():
            self.weight.copy_(W.t())

    def apply(self, x: Tensor, W: Float[Tensor, "*stack out in"]) -> Tensor:
        return self._look_up(x, W) * self._scale(W)

    def down(self, x: Tensor, A: Float[Tensor, "*stack rank in"]) -> Tensor:
        return self._look_up(x, A)

    def up(self, h: Tensor, B: Float[Tensor, "*stack out rank"]) -> Tensor:
        return F.linear(h, B) * self._scale(B)

    def low_rank_rows(
        self,
        x: Tensor,
        A: Float[Tensor, "adapters *stack rank in"],
        B: Float[Tensor, "adapters *stack out rank"],
        which: Int[Tensor, " rows"],
    ) -> Tensor:
        adapters, rank, vocab = A.shape
        ids, pad, by_freq = x.reshape(x.shape[0], -1), self.module.padding_idx, self.module.scale_grad_by_freq
        tables = A.mT.reshape(adapters * vocab, rank)  # one below the other, so that no table is copied for a row
        h = F.embedding(ids + vocab * which.unsqueeze(1), tables, None, None, 2.0, by_freq, False)
        if pad is not None:
            h = torch.where((ids == pad).unsqueeze(-1), h.detach(), h)
        y = torch.bmm(h, B[which].mT) * self._scale(B)
        return y.reshape(*x.shape, y.shape[-1])

    def drop(self, x: Tensor, p: float, training: bool) -> Tensor:
        raise ValueError(
            f"layer '{self.name}' is an embedding: its input is token ids, so dropout {p} cannot apply to it; "
            f"set per_layer={{'{self.name.split('.')[-1]}': {{'dropout': 0.0}}}}, or leave the layer out with exclude="
        )

    def _look_up(self, ids: Tensor, M: Tensor) -> Tensor:
        m = self.module
        return F.embedding(ids, M.t(), m.padding_idx, None, 2.0, m.scale_grad_by_freq, False)

    def _scale(self, like: Tensor) -> Tensor | float:
        scale = getattr(self.module, "embed_scale", 1.0)
        return scale.to(like.dtype) if isinstance(scale, Tensor) else scale
