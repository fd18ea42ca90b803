"""Modules trained in full, whose rows each take the copy that their adapter has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loratory.runtime.layer import BASE, LAYER, Copies, Copy, is_swapped
from loratory.runtime.norms import ASKED
from loratory.runtime.row_route import Batch
from loratory.runtime.state import state_of

_ROW_BY_ROW = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.GroupNorm, nn.modules.conv._ConvNd)


def treats_rows_apart(module: nn.Module) -> bool:
    """Whether a module is known to treat each row of a batch by itself (a batch norm in training does not)."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return not module.__dict__.get(ASKED, module.training)
    return isinstance(module, _ROW_BY_ROW) or type(module).__name__.endswith(("RMSNorm", "Conv1D"))


def give_rows_copies(model: nn.Module, owner: str, copies: Copies, batch: Batch) -> Any:
    """A hook that gives the rows of each adapter with copies of this module's tensors the output that they make."""
    module: Any = model.get_submodule(owner)
    state, layer = state_of(model), module._modules.get(LAYER, ())
    distinct = [n for n in dict.fromkeys(batch.names) if n is not None and n in copies]
    forward = type(module).__mro__[1 if is_swapped(module) else 0].forward  # type: ignore[attr-defined]

    def own_rows(module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor | None:
        if state.rows is not batch or not distinct:
            return None
        x = batch.fit(owner, args[0])
        y, at = y.expand(x.shape[0], *y.shape[1:]), _numbers(batch, distinct, x)
        for i, name in enumerate(distinct):
            copy: Any = copies[name]
            mine = (at == i).nonzero().flatten()
            if name in layer:  # an adapted layer's copy is its bias, which each path adds
                more = layer.site.along_out(copy.bias - copies[BASE].bias).to(y.dtype)
                y = y.index_add(0, mine, more.expand(len(mine), *y.shape[1:]))
                continue
            with _in_place(module, copy):
                part = forward(module, x.index_select(0, mine), *args[1:])
            y = y.index_copy(0, mine, part.to(y.dtype))
        return y

    return module.register_forward_hook(own_rows)


def _numbers(batch: Batch, distinct: list[str], x: Tensor) -> Tensor:
    """For each row of x the number of its adapter among these; -1: none of them."""
    copies = x.shape[0] // batch.size
    numbers = [distinct.index(n) if n in distinct else -1 for n in batch.names for _ in range(copies)]
    return torch.tensor(numbers, device=x.device)


@contextmanager
def _in_place(module: nn.Module, copy: Copy) -> Iterator[None]:
    """A module with the tensors of a copy."""
    before = dict(module._parameters), dict(module._buffers)
    module._parameters |= dict(copy.named_parameters())
    module._buffers |= dict(copy.named_buffers())
    try:
        yield
    finally:
        module._parameters, module._buffers = before
