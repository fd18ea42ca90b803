"""Keep less for the backward pass: norms, activations, gated products and narrow weights are made again there instead of being kept.

Of a layer's input y = norm(x), x alone is kept; of an MLP's down_proj input y = act(gate) * up, gate and up; see `ops.made_again`.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, Self

from torch import Tensor, nn

from loratory.ops.low_rank import CAST_AGAIN
from loratory.ops.made_again import made_again
from loratory.runtime.layer import subclass, swap_class
from loratory.runtime.shards import gathers_itself
from loratory.runtime.state import unwrap

LEAN = "_loratory_lean_activations"
NORMS = ("RMSNorm", "LayerNorm")  # ends of class names
ACTIVATIONS = ("GELU", "SiLU", "Mish")  # parts of class names; of ReLU and others autograd keeps the output alone


class LeanActivations:
    """The modules of one model whose outputs are made again, by name. `close` lets them be kept again."""

    def __init__(self, modules: dict[str, nn.Module], linears: list[nn.Module]) -> None:
        self.modules, self.linears = modules, linears

    def close(self) -> None:
        """As it was."""
        for module in self.modules.values():
            module.__dict__.pop(LEAN, None)
            if LEAN in type(module).__dict__:  # nobody put another class above ours
                swap_class(module, type(module).__mro__[1])
        for module in self.linears:
            module.__dict__.pop(CAST_AGAIN, None)
        self.modules, self.linears = {}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def lean_activations(model: nn.Module) -> LeanActivations:
    """Make cheap intermediate results again in the backward pass instead of keeping them; gives a handle with `modules` and `close`.

        y = norm(x), y = act(x), y = act(gate) * up      kept: x; x; gate and up

    Norms (classes named ...RMSNorm or ...LayerNorm), activations, and MLPs of the form down_proj(act_fn(gate_proj(x)) * up_proj(x))
    are found by themselves. Outputs and gradients are those of the plain path. It saves where the layer that takes y is a
    low-rank one of ours, which then keeps none of it; a norm that is trained keeps its output. Under autocast such layers narrow their
    frozen weight again, too. Inside gradient checkpointing it lowers
    the peak within a block. Training forwards alone do it; under torch.compile, which decides itself, nothing changes. A second call
    changes nothing.
    """
    found: dict[str, nn.Module] = {}
    for name, module in _found(unwrap(model)):
        module.__dict__[LEAN] = True
        if not hasattr(type(module), LEAN):
            cls: Any = type(module)
            swap_class(module, _lean_mlp(cls) if _is_gated(module) else _lean_module(cls))
        found[name] = module
    linears: list[nn.Module] = [module for module in unwrap(model).modules() if isinstance(module, nn.Linear)]
    for module in linears:
        module.__dict__[CAST_AGAIN] = True
    return LeanActivations(found, linears)


def _found(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: set[nn.Module] = set()  # a gated MLP's own activation
    for name, module in model.named_modules():
        if module in inside:
            continue
        if _is_gated(module):
            inside.add(module.act_fn)  # type: ignore[arg-type]
            yield name, module
        elif _is_cheap(module):
            yield name, module


def _is_cheap(module: nn.Module) -> bool:
    """One tensor in, one of its shape out, for the price of reading it."""
    code = getattr(type(module).forward, "__code__", None)
    one = isinstance(module, nn.LayerNorm | nn.RMSNorm) or LEAN in module.__dict__ or _takes_one(code)
    if not one or getattr(module, "inplace", False):
        return False
    name, place = type(module).__name__, type(module).__module__
    known = place.startswith("torch.nn.modules.") or place == "transformers.activations"
    return name.endswith(NORMS) or (known and any(part in name for part in ACTIVATIONS))


def _takes_one(code: Any) -> bool:
    return code is not None and code.co_argcount == 2 and not code.co_kwonlyargcount


def _is_gated(module: nn.Module) -> bool:
    """Whether the module's forward is, operation by operation, that of `_gated`."""
    children = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if not all(isinstance(getattr(module, child, None), nn.Module) for child in children):
        return False
    code = getattr(type(module).forward, "__code__", None)
    return LEAN in module.__dict__ or any(
        code is not None and (code.co_code, code.co_names) == (form.__code__.co_code, form.__code__.co_names)
        for form in (_gated, _gated_and_named)
    )


def _gated(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def _gated_and_named(self: Any, x: Tensor) -> Tensor:
    y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return y


def _product(act: Any, gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def _is_on(module: nn.Module) -> bool:
    """Not where it is trained, or could not run again by itself in the backward pass."""
    trained = any(p is not None and p.requires_grad for p in module._parameters.values())
    return LEAN in module.__dict__ and not trained and not gathers_itself(module)


@cache
def _lean_module(cls: Any) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _is_on(self):
            return cls.forward(self, x)
        return made_again(partial(cls.forward, self), x)

    return subclass(cls, {"forward": forward, LEAN: True}, _lean_module)


@cache
def _lean_mlp(cls: Any) -> type[nn.Module]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if LEAN not in self.__dict__ or any(p.requires_grad for p in self.act_fn.parameters()):
            return cls.forward(self, x)
        return self.down_proj(made_again(partial(_product, self.act_fn), self.gate_proj(x), self.up_proj(x)))

    return subclass(cls, {"forward": forward, LEAN: True}, _lean_mlp)
