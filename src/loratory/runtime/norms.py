"""Normalisation layers with running statistics (batch norm), which a forward pass in training mode would change.

They belong to the frozen base, so they are held in evaluation mode while no active adapter has a copy of their own:
the base stays bit for bit, and training sees the same function as evaluation.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from loratory.runtime.layer import BASE, COPIES, swap_class

HELD, ASKED = "_loratory_held", "_loratory_mode"


def with_statistics(model: nn.Module) -> dict[str, Any]:
    """The modules that keep running statistics (batch norm, instance norm where told), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module._buffers.get("running_mean") is not None
    }


def hold_norms(model: nn.Module) -> None:
    """Hold those in evaluation mode whose statistics are the base's at the moment; let go of those with an adapter's own."""
    for module in with_statistics(model).values():
        held, base = is_held(module), has_base_statistics(module)
        if base and not held:
            hold(module)
        elif held and not base:
            _let_go(module)


def hold(module: nn.Module) -> None:
    """Hold one module in evaluation mode."""
    module.__dict__[ASKED] = module.training
    cls: Any = type(module)
    swap_class(module, held_class(cls))
    module.training = False


def release_norms(model: nn.Module) -> None:
    """Let go of all: each is in the mode that was last asked for."""
    for module in with_statistics(model).values():
        if is_held(module):
            _let_go(module)


def is_held(module: nn.Module) -> bool:
    return HELD in type(module).__dict__


def has_base_statistics(module: nn.Module) -> bool:
    copies: Any = module._modules.get(COPIES)
    base = None if copies is None else getattr(copies[BASE], "running_mean", None)
    return base is None or module._buffers["running_mean"] is base


def held_note(model: nn.Module, copied: list[str]) -> list[str]:
    """A sentence for the summary, where there is something to say."""
    held = [name for name in with_statistics(model) if f"{name}.running_mean" not in copied]
    if not held:
        return []
    return [
        f"{len(held)} normalisation layers keep the base's running statistics (they are held in evaluation mode; also_train= frees them)"
    ]


def _let_go(module: nn.Module) -> None:
    swap_class(module, type(module).__mro__[1])
    module.training = module.__dict__.pop(ASKED)


@cache
def held_class(cls: Any) -> type[nn.Module]:
    """A subclass of a layer's class, with its name, that stays in evaluation mode and remembers what was asked for."""

    def train(self: Any, mode: bool = True) -> Any:
        self.__dict__[ASKED] = mode
        return cls.train(self, False)

    def reduce(self: Any, protocol: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        return _new, (cls,), self.__dict__  # pickle looks classes up by name, where this one is not

    members = {"train": train, "__reduce_ex__": reduce, "__module__": cls.__module__, HELD: True}
    return type(cls.__name__, (cls,), members)


def _new(cls: Any) -> nn.Module:
    made = held_class(cls)
    return made.__new__(made)
