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


def bound_step(model: Any, base: set[int], inputs: Inputs, optimizer: Optimizer) -> Trace:
    """A bound on what a step holds. base: ids of the frozen model's own tensors."""
    tokens = max(math.prod(shape[:2]) if len(shape) == 2 else shape[0] for shape, _ in inputs.values())
    own: dict[int, int] = {}
    added: dict[int, int] = {}
    for t in (*model.parameters(), *model.buffers()):
        (own if id(t) in base else added)[id(t)] = t.numel() * t.element_size()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    width = max(p.element_size() for p in model.parameters() if p.is_floating_point())
    heads = set(head_names(model))
    activations = logits = scratch = 0
    for name, module in model.named_modules():
        shape = matrix(module)
        if shape is None:
            continue
        outputs, ins = shape
        if name in heads:
            logits += 3 * 4 * tokens * outputs
        else:
            activations += COPIES * width * tokens * (outputs + ins)
    for layer in layers_of(model).values():
        if layer.site.kind == "block":
            continue
        for adapter in layer.adapters():
            needs = adapter.method.footprint(*layer.site.shape[-2:])
            activations += 4 * (tokens * needs.per_token + needs.kept)
            scratch = max(scratch, 4 * needs.scratch)
    activations += attention(model, inputs)
    parts = {
        "weights": sum(own.values()), "adapters": sum(added.values()), "gradients": gradients, "optimizer": optimizer.states(trained),
        "activations": activations, "logits": logits, "temporaries": scratch + optimizer.temporaries(trained, on_gpu=True),
    }  # fmt: skip
    peak = Peak(sum(parts.values()), parts, "backward")
    return Trace(peak, parts["weights"], parts["adapters"], gradients, parts["optimizer"])


def matrix(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of a layer with a weight of its own."""
    if isinstance(module, Packed):
        return module.outputs, module.inputs
    weight = module._parameters.get("weight")
    if weight is None:
        found = [p for p in module._parameters.values() if p is not None and p.dim() >= 2]
        weight = found[0] if found else None
    if weight is None:
        return None
    if weight.dim() == 1:
        return weight.shape[0], weight.shape[0]
    return int(weight.shape[-2]), int(weight.shape[-1])


def attention(model: Any, inputs: Inputs) -> int:
    """Scores and probabilities of every block, as if all were kept."""
    config = getattr(model, "config", None)
    ids = inputs.get("input_ids")
    if config is None or ids is None:
        return 0
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, blocks = getattr(text, "num_attention_heads", 0) or 0, getattr(text, "num_hidden_layers", 0) or 0
    (batch, length), _ = ids
    return 3 * torch.float32.itemsize * batch * heads * blocks * length * length
