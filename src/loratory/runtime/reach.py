"""Every adapted layer must be reached: at the first optimizer step each of its trained tensors has a gradient, or an error names it.

A layer whose forward is never called (code that reads `.weight` itself) would otherwise train nothing without a word.
"""

from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from loratory.runtime.drive import is_driven
from loratory.runtime.layer import layers_of
from loratory.runtime.state import is_adapted, state_of

_unchecked: "WeakSet[nn.Module]" = WeakSet()
_watching = False


def expect_gradients(model: nn.Module) -> None:
    """Check this model at the next step of an optimizer that trains one of its adapters."""
    global _watching
    _unchecked.add(model)
    if not _watching:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _watching = True


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if _unchecked and not _has_closure(args, kwargs):
        _check(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _unchecked or not _has_closure(args, kwargs):  # with one, gradients come inside the step: Lightning, LBFGS
        return
    if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
        _check(optimizer)


def _has_closure(args: Any, kwargs: Any) -> bool:
    return kwargs.get("closure") is not None or (len(args) > 1 and args[1] is not None)  # args[0] is the optimizer


def _refuse_undriven(model: nn.Module, stepped: set[int]) -> None:
    for layer in layers_of(model).values():
        for t in layer.active:
            mine = any(id(p) in stepped for p in t.trained().values())
            if mine and t.method.acts_in_training and not is_driven(model):
                raise RuntimeError(
                    f"layer '{layer.site.name}': {type(t.method).__name__} acts during training; call loratory.drive(model, optimizer, "
                    "steps=...) once before the loop"
                )


def _check(optimizer: torch.optim.Optimizer) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for model in list(_unchecked):
        if not is_adapted(model):
            _unchecked.discard(model)
            continue
        _refuse_undriven(model, stepped)
        adaptations = state_of(model).adaptations
        mine = {
            f"{name}.{tensor}": p
            for name, layer in layers_of(model).items()
            for adapter, entry in layer.items()
            if any(entry is a for a in layer.active) and not adaptations[adapter].allow_unused
            for tensor, p in entry.trained().items()  # type: ignore[operator]
            if p.requires_grad and id(p) in stepped
        }
        if not mine:
            continue
        _unchecked.discard(model)
        unreached = sorted({key.rpartition(".")[0] for key, p in mine.items() if p.grad is None})
        if unreached:
            raise RuntimeError(
                f"layer '{unreached[0]}'{f' and {len(unreached) - 1} more' if len(unreached) > 1 else ''} got no gradient in the first step: "
                "it was not called or read, or its output does not reach the loss; leave it out with exclude=, or pass allow_unused=True "
                "if it is used only for some inputs"
            )
