"""An upper bound for a step whose code cannot be run without data: nothing that a layer reads or writes is freed before the end."""

import math
from typing import Any

import torch
from torch import nn

from loratory.plan.job import Inputs
from loratory.plan.ledger import Peak
from loratory.plan.optimizers import Optimizer
from loratory.plan.trace import Trace
from loratory.runtime.layer import layers_of
from loratory.runtime.where import head_names
from loratory.sites.packed import Packed

COPIES = 4  # of a layer's input and output: norms, activations, sums and their gradients
SPECIAL = 16  # tokens of a picture beside its patches, at most: class tokens, registers
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bound_step(model: Any, base: set[int], inputs: Inputs, optimizer: Optimizer) -> Trace:
    """A bound on what a step holds. base: ids of the frozen model's own tensors."""
    rows, length = max(shape[0] for shape, _ in inputs.values()), longest(model, inputs)
    tokens = rows * length
    own: dict[int, int] = {}
    added: dict[int, int] = {}
    for t in (*model.parameters(), *model.buffers()):
        (own if id(t) in base else added)[id(t)] = t.numel() * t.element_size()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    width = max(p.element_size() for p in model.parameters() if p.is_floating_point())
    heads = set(head_names(model))
    activations = COPIES * sum(math.prod(shape) * dtype.itemsize for shape, dtype in inputs.values())
    logits = scratch = 0
    for name, module in model.named_modules():
        shape = matrix(module)
        if shape is None:
            continue
        outputs, ins = shape
        if name in heads:
            logits += 3 * 4 * tokens * outputs
        else:
            activations += COPIES * width * tokens * (outputs + ins)
        if isinstance(module, CONVOLUTIONS):  # the kernel's own copies, see kernels.py
            scratch = max(scratch, width * (tokens * (outputs + ins) + module.weight.numel()))
    for layer in layers_of(model).values():
        if layer.site.kind == "block":
            continue
        *stack, outputs, ins = layer.site.shape  # groups of a convolution, experts
        whole = 0 if layer.site.called else 2 * outputs * ins  # W' and its gradient, where the model's code reads it
        for adapter in layer.adapters():
            needs = adapter.method.footprint(outputs, ins)
            activations += 4 * math.prod(stack) * (tokens * needs.per_token + max(needs.kept, whole))
            scratch = max(scratch, 4 * math.prod(stack) * max(needs.scratch, whole))
    activations += attention(model, rows, length)
    parts = {
        "weights": sum(own.values()), "adapters": sum(added.values()), "gradients": gradients, "optimizer": optimizer.states(trained),
        "activations": activations, "logits": logits, "temporaries": scratch + optimizer.temporaries(trained, on_gpu=True),
    }  # fmt: skip
    peak = Peak(sum(parts.values()), parts, "backward")
    return Trace(peak, parts["weights"], parts["adapters"], gradients, parts["optimizer"])


def longest(model: nn.Module, inputs: Inputs) -> int:
    """The most places that a layer sees in one row of the batch: tokens or points of a picture, and virtual tokens."""
    virtual = [
        getattr(each.method, "tokens", 0)
        for layer in layers_of(model).values() if layer.site.kind == "block"
        for each in layer.adapters()
    ]  # fmt: skip
    return sum(virtual) + max(places(model, shape) for shape, _ in inputs.values())


def places(model: nn.Module, shape: tuple[int, ...]) -> int:
    """The places of one input: tokens; of a picture (rows, channels, height, width) those that the layers which read it leave.

    These are the convolutions for so many channels; without one every point counts. No later layer sees more.
    """
    inner = shape[1:]
    if len(inner) < 2:
        return math.prod(inner)
    picture = len(inner) == 3
    read = [m.stride for m in model.modules() if picture and isinstance(m, nn.Conv2d) and m.in_channels == inner[0]]
    left = [math.prod(-(-size // step) for size, step in zip(inner[1:], stride, strict=True)) for stride in read]
    return max(left, default=math.prod(inner) // min(inner)) + SPECIAL


def matrix(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a layer with a weight of its own."""
    if isinstance(module, Packed):
        return module.outputs, module.inputs
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels, module.in_channels
    weight = module._parameters.get("weight")
    if weight is None:
        found = [p for p in module._parameters.values() if p is not None and p.dim() >= 2]
        weight = found[0] if found else None
    if weight is None:
        return None
    if weight.dim() == 1:
        return weight.shape[0], weight.shape[0]
    return int(weight.shape[-2]), int(weight.shape[-1])


def attention(model: Any, rows: int, length: int) -> int:
    """Scores and probabilities of every block, as if all were kept."""
    config = getattr(model, "config", None)
    if config is None:
        return 0
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parts = [config, text, getattr(config, "vision_config", None)]
    return 3 * torch.float32.itemsize * rows * max(map(maps, parts)) * length * length


def maps(config: Any) -> int:
    """Heads of all blocks; where stages have different numbers of heads, the most count."""
    heads, blocks = (getattr(config, name, None) or 0 for name in ("num_attention_heads", "num_hidden_layers"))
    return (heads if isinstance(heads, int) else max(heads)) * blocks
