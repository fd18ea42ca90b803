"""Adapted layers that share their input run as one: q, k and v of an attention, gate and up of an MLP.

The first of them that is called computes the others too (see `ops.low_rank.low_rank_linears`), and each hands out its own output
when it is called with that same input. Which layers may share it is read off their names; that they do is seen at each call by
the tensor itself, so a layer called with another input computes alone.
"""

import re
from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loratory.methods.method import scaled_factors
from loratory.ops.low_rank import CAST_AGAIN, Member, is_fused, low_rank_linears
from loratory.runtime.layer import Layer, Route
from loratory.runtime.shards import gathers_itself

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Qwen, Gemma, Mistral, OPT, CLIP
    ("query", "key", "value"),  # BERT, ViT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("q", "k", "v"),  # T5, MPNet
    ("to_q", "to_k", "to_v"),  # diffusers
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),  # T5 v1.1
    ("w1", "w3"),
)
CROSS = re.compile(r"cross|encoder_attn|encdec", re.IGNORECASE)  # attention whose k and v see another tensor
MISSES = 2  # times in succession that outputs were made in vain, until the layers part


class Round:
    """Outputs that were made of one input and wait to be handed out."""

    def __init__(self, x: Tensor, key: Any, outputs: dict[int, Tensor]) -> None:
        self.x, self.key, self.outputs = x, key, outputs


class Group:
    """Layers that share their input. `round` is empty outside of their module's forward."""

    def __init__(self, layers: Sequence[Layer], alone: Route) -> None:
        self.layers, self.alone = tuple(layers), alone
        self.round: Round | None = None
        self.missed = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"round": None}  # copies and files of a model hold no outputs

    def output(self, i: int, base: Any, x: Tensor) -> Tensor:
        """Layer i's output for x."""
        layer, key, waiting = self.layers[i], _key(x), self.round
        if waiting is not None and waiting.x is x and waiting.key == key and i in waiting.outputs:
            y = waiting.outputs.pop(i)
            if not waiting.outputs:
                self.round, self.missed = None, 0
            return y
        self.round = None
        if waiting is not None:
            self.missed += 1
            if self.missed == MISSES:
                self.part(waiting.outputs)
                return layer.route(layer, base, x)
        members = [member for each in self.layers if (member := _member(each)) is not None]
        if len(members) < len(self.layers):
            return self.alone(layer, base, x)
        if sum(len(member.A) for member in members) > layer.site.inputs:  # one product with all A would be no small one
            for each in self.layers:
                each.route = self.alone
            return self.alone(layer, base, x)
        outputs = dict(enumerate(low_rank_linears(x, members)))
        y = outputs.pop(i)
        self.round = Round(x, key, outputs)
        return y

    def part(self, waiting: Container[int]) -> None:
        """The layers whose outputs were not asked for go their own way."""
        _join([layer for i, layer in enumerate(self.layers) if i in waiting], self.alone)
        _join([layer for i, layer in enumerate(self.layers) if i not in waiting], self.alone)


def fuse(layers: Mapping[str, Layer], alone: Route) -> None:
    """Let siblings among these layers run as one, whose route would be `alone`, that of one adapter of low rank."""
    named = {name: layer for name, layer in layers.items() if layer.route is alone and _can(layer)}
    parents: dict[str, dict[str, Layer]] = {}
    for name, layer in named.items():
        parent, _, leaf = name.rpartition(".")
        parents.setdefault(parent, {})[leaf] = layer
    for parent, children in parents.items():
        if CROSS.search(parent):
            continue
        for names in SIBLINGS:
            _join([children[leaf] for leaf in names if leaf in children], alone)


def fused_route(group: Group, i: int, layer: Layer, base: Any, x: Tensor) -> Tensor:
    return group.output(i, base, x) if is_fused() else group.alone(layer, base, x)


def _join(layers: Sequence[Layer], alone: Route) -> None:
    """One group of these layers; a single one runs alone."""
    same = len({layer.site.inputs for layer in layers}) == 1
    group = Group(layers, alone) if len(layers) > 1 and same else None
    for i, layer in enumerate(layers):
        layer.route = alone if group is None else partial(fused_route, group, i)


def _can(layer: Layer) -> bool:
    """Whether the layer's forward is known to be a linear layer's, and its update's input is x."""
    return type(layer.site.module).__mro__[1] is nn.Linear and not layer.active[0].method.input_dropout


def _member(layer: Layer) -> Member | None:
    """The layer's tensors as they are now; None where they are not all here: offloaded, or sharded by themselves."""
    module, (t,) = layer.site.module, layer.active
    if "_hf_hook" in module.__dict__ or gathers_itself(module):
        return None
    B, s, A = scaled_factors(t.method.factors(t))
    return Member(module.weight, module.bias, A, B, s, CAST_AGAIN in module.__dict__)


def _key(x: Tensor) -> Any:
    """What else must be the same for an output to be the one that was made."""
    version = -1 if x.is_inference() else x._version
    device = x.device.type
    return version, torch.is_grad_enabled(), torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
