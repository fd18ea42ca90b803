"""What the methods of the active adapters add to the loss."""

import torch
from torch import Tensor, nn

from loratory.methods.method import Method
from loratory.runtime.layer import layers_of
from loratory.runtime.state import state_of, unwrap


def penalty(model: nn.Module) -> Tensor:
    """The sum of the penalties of all layers with an active adapter, a number with its gradient; 0 where no method has one.

    `loratory train` adds it to the loss. In a loop of your own: `loss = model(**batch).loss + loratory.penalty(model)`.
    """
    model = unwrap(model)
    state_of(model)
    layers = layers_of(model).values()
    parts = [part for layer in layers for t in layer.active if (part := t.method.penalty(t)) is not None]
    if parts:
        return torch.stack(parts).sum()
    return torch.zeros((), device=next(model.parameters()).device)


def has_penalty(model: nn.Module) -> bool:
    """Whether a method of an active adapter states a penalty."""
    return any(
        type(t.method).penalty is not Method.penalty
        for layer in layers_of(unwrap(model)).values()
        for t in layer.active
    )
