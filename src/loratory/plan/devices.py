"""Several devices: what each of them holds.

ddp    everything one device holds, and a copy of the gradients in buckets that are averaged
fsdp   a share of weights, adapters, gradients and states; the whole weights of two blocks (the one that runs and the next, which is
       fetched meanwhile), of what belongs to no block, and the whole gradients of one block until they are averaged
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from loratory.plan.job import Sharding
from loratory.plan.ledger import PARTS


@dataclass(frozen=True)
class Blocks:
    """What is gathered together under fsdp. Bytes."""

    largest: int  # of one block's tensors
    outside: int  # of tensors in no block
    gradients: int  # of the trained tensors of the block that has most
    count: int


def blocks_of(model: Any) -> Blocks:
    """The model's own blocks (`_no_split_modules` of transformers), or the whole model as one."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [m for m in model.modules() if any(c.__name__ in names for c in type(m).__mro__)]
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
    if not blocks:
        blocks = [model]
        outside = 0
    return Blocks(max(map(size, blocks)), outside, max(size(b, trained=True) for b in blocks), len(blocks))


def size(module: nn.Module, trained: bool = False) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained)


def on_each(
    parts: Mapping[str, int], gradients: int, devices: int, sharding: Sharding, blocks: Blocks
) -> dict[str, int]:
    """The parts of a peak on each of several devices. gradients: bytes of all gradients."""
    found = {part: parts.get(part, 0) for part in PARTS}
    if sharding == "ddp" and devices > 1:
        found["gradients"] += gradients
    if sharding == "fsdp":
        for part in ("weights", "adapters", "gradients", "optimizer"):
            found[part] = -(-found[part] // devices)
        found["weights"] += blocks.outside + min(2, blocks.count) * blocks.largest
        found["temporaries"] += blocks.gradients
    return found
