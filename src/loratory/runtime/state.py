"""What the runtime remembers about an adapted model, kept on its root: adapters, what is active, what was trainable before."""

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import nn

from loratory.methods.method import Method


@dataclass
class Adaptation:
    """One adapter name."""

    method: Method
    layers: dict[str, Method]  # the method of each layer, per-layer settings included
    copied: list[str]  # parameters and buffers trained in full, or kept
    bias: str = "none"
    untied: bool = False
    allow_unused: bool = False
    training: dict[str, Any] | None = None  # record of the run that trained it
    notes: list[str] = field(default_factory=list)
    kept: list[str] = field(
        default_factory=list
    )  # of copied: held beside, but not trained (the base of a resized vocabulary)


@dataclass
class State:
    adaptations: dict[str, Adaptation] = field(default_factory=dict)
    active: tuple[str, ...] = ()
    mix: tuple[float, ...] | None = None
    merged: tuple[str, ...] = ()
    trainable: dict[str, bool] = field(default_factory=dict)  # requires_grad of the base before the first adapter
    tied: list[Any] = field(default_factory=list)  # configs that said at first that input embedding and head are tied
    parted: dict[str, str] = field(default_factory=dict)  # weights a merge gave of their own -> their partners
    rows: Any = None  # inside `rows`: its batch


_KEY, _TRANSFORMS = "_loratory_state", "_loratory_transforms"


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own model inside DistributedDataParallel, DataParallel, DeepSpeed or torch.compile."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel", "DeepSpeedEngine") and hasattr(
            model, "module"
        ):
            model = model.module  # type: ignore[assignment]
        else:
            return model


def state_of(model: nn.Module) -> State:
    """The state of an adapted model."""
    state = unwrap(model).__dict__.get(_KEY)
    if state is None:
        raise ValueError(
            f"this {type(unwrap(model)).__name__} has no adapters; call loratory.adapt(model, ...) or loratory.load(model, folder) first, "
            "and pass the same object that was adapted, not a part of it"
        )
    return state


def is_adapted(model: nn.Module) -> bool:
    return _KEY in unwrap(model).__dict__


def set_state(model: nn.Module, state: State | None) -> None:
    if state is None:
        unwrap(model).__dict__.pop(_KEY, None)
    else:
        unwrap(model).__dict__[_KEY] = state


def transforms_of(model: nn.Module) -> list[str]:
    """What was done to the base, in order. It outlives the adapters; transforms append to it."""
    found: list[str] = unwrap(model).__dict__.setdefault(_TRANSFORMS, [])
    return found


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    return tuple(state_of(model).adaptations) if is_adapted(model) else ()


def require_adapter(model: nn.Module, name: str) -> Adaptation:
    """The adaptation of this name."""
    known = state_of(model).adaptations
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.0)
        raise ValueError(f"there is no adapter '{name}'; the model has: {', '.join(near)}")
    return known[name]


def in_rows(model: nn.Module) -> bool:
    """Whether each batch row has its own adapter now."""
    return is_adapted(model) and state_of(model).rows is not None


def refuse_in_rows(model: nn.Module, what: str) -> None:
    """Adapters stay as they are while each batch row has its own."""
    if in_rows(model):
        raise RuntimeError(
            f"inside `with loratory.rows(...)` each batch row has its own adapter, so {what} must wait; leave the block first"
        )


def one_name(model: nn.Module, name: str | None) -> str:
    """The given adapter, or the only active one."""
    if name is not None:
        require_adapter(model, name)
        return name
    state = state_of(model)
    if len(state.active) == 1:
        return state.active[0]
    if len(state.adaptations) == 1:
        return next(iter(state.adaptations))
    raise ValueError(
        f"the model has adapters {', '.join(state.adaptations)}, active: {', '.join(state.active) or 'none'}; say which with name="
    )
