"""The body of a vision transformer with virtual tokens among its patches; the contract stands in sites/vision.py.

Its blocks carry forward hooks: one before each block, which puts the virtual tokens into its input, and one behind the last block,
which takes them out. The body's class is swapped, as a layer's is: its forward cuts them off the hidden states of single blocks.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loratory.runtime.layer import LAYER, Layer, is_ours, restore_class, subclass, swap_class
from loratory.sites.block import parameters
from loratory.sites.vision import VisionSite, blocks_of


def seat(site: VisionSite) -> Layer:
    """The layer of a body, made where there is none yet: the body's class is swapped and its blocks get their hooks."""
    module: Any = site.module
    if LAYER not in module._modules:
        layer, blocks = Layer(site), site.blocks
        swap_class(module, adapted_vision(module.__class__))
        for number, block in enumerate(blocks):
            names = parameters(block)
            mask = names.index("attention_mask") if "attention_mask" in names else -1
            block.register_forward_pre_hook(Inserts(layer, number, mask), with_kwargs=True)
        blocks[-1].register_forward_hook(TakesOut(layer))
        module.add_module(LAYER, layer)
        module.train(module.training)
    return module._modules[LAYER]


def unseat(layer: Layer) -> None:
    """Undo `seat`."""
    module = layer.site.module
    for block in blocks_of(module).values():
        for key in [k for k, hook in block._forward_pre_hooks.items() if isinstance(hook, Inserts)]:
            del block._forward_pre_hooks[key], block._forward_pre_hooks_with_kwargs[key]
        for key in [k for k, hook in block._forward_hooks.items() if isinstance(hook, TakesOut)]:
            del block._forward_hooks[key]
    del module._modules[LAYER]
    restore_class(module)
    module.train(module.training)


@functools.cache
def adapted_vision(cls: Any) -> type[nn.Module]:
    """A subclass of a body's class, with its name, whose outputs have no entries of virtual tokens and whose frozen parts rest."""
    names = tuple(inspect.signature(cls.forward).parameters)[1:]

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self.loratory
        if not layer.active:
            return cls.forward(self, *args, **kwargs)
        t = layer.active[0]
        call = dict(zip(names, args, strict=False)) | kwargs
        if call.get("attention_mask") is not None:
            raise RuntimeError(
                f"{type(t.method).__name__}: the call has an attention_mask over patches, in which virtual tokens have no place; leave it out"
            )
        return_dict = call.pop("return_dict", None)
        out = cls.forward(self, **call, return_dict=True)
        cut(out, t.method.tokens)
        plain = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return out if plain else out.to_tuple()

    def train(self: Any, mode: bool = True) -> Any:
        cls.train(self, mode)
        blocks = [f"{name}." for name in blocks_of(self)]
        for name, module in self.named_modules():
            around = any(
                block.startswith(f"{name}.") for block in blocks
            )  # gradient checkpointing asks a block's own mode
            if name and not around and not is_ours(name):
                module.training = False
        return self

    return subclass(cls, {"forward": forward, "train": train}, adapted_vision)


def cut(out: Any, n: int) -> None:
    """Take the n virtual tokens out of the hidden states and attentions of single blocks; keys stay."""
    length = out["last_hidden_state"].shape[1]
    for key, dim in (("hidden_states", 1), ("attentions", 2)):
        if out.get(key) is not None:
            out[key] = tuple(v if v is None or v.shape[dim] == length else without(v, n, dim) for v in out[key])


def without(x: Tensor, n: int, dim: int = 1) -> Tensor:
    """x without the n entries behind the first one."""
    return torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 1 + n, x.shape[dim] - 1 - n)], dim)


@dataclass(eq=False)
class Inserts:
    """Forward pre-hook of one block: puts the active adapter's virtual tokens behind the class token.

    A mask that the body made itself shows every row to every row, and counts no virtual tokens: the block gets none.
    """

    layer: Layer
    block: int
    mask: int  # where the block's forward takes attention_mask; -1: nowhere

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.layer.active:
            return None
        t: Any = self.layer.active[0]
        if 0 < self.mask < len(args):
            args = (*args[: self.mask], None, *args[self.mask + 1 :])
        elif "attention_mask" in kwargs:
            kwargs = kwargs | {"attention_mask": None}
        x = args[0] if args else kwargs["hidden_states"]
        P = t.method.inserted(t, self.block, x)
        if P is not None:
            old = t.method.tokens if self.block else 0
            x = torch.cat([x[:, :1], P.to(x.dtype), x[:, 1 + old :]], 1)
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})


@dataclass(eq=False)
class TakesOut:
    """Forward hook of the last block: takes the virtual tokens out."""

    layer: Layer

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        if not self.layer.active:
            return None
        t: Any = self.layer.active[0]
        n = t.method.tokens
        return (without(output[0], n), *output[1:]) if isinstance(output, tuple) else without(output, n)
