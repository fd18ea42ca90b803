"""One training step on tensors without data: the model's own code runs, and the ledger notes what it allocates."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
)

from loratory.ops.recomputed import sampled
from loratory.plan.job import Inputs
from loratory.plan.ledger import Ledger, Peak
from loratory.plan.optimizers import Optimizer
from loratory.runtime.layer import layers_of
from loratory.runtime.where import head_names

# What code raises that must see numbers to go on (each of torch's exceptions for that is one), or whose rule of shapes refuses what
# its kernel takes.
Untraceable = RuntimeError


@dataclass(frozen=True)
class Trace:
    """What one training step does."""

    peak: Peak
    weights: int  # bytes of the frozen base
    adapters: int  # bytes of the method's tensors
    gradients: int
    optimizer: int  # bytes of the optimizer's states
    flops: dict[torch.dtype, int] = field(default_factory=dict)
    moved: int = 0
    operations: int = 0


def trace_step(
    model: nn.Module,
    base: set[int],
    inputs: Inputs,
    optimizer: Optimizer,
    *,
    micro_batches: int = 1,
    on_gpu: bool = True,
    loss: Callable[..., Tensor] | None = None,
) -> Trace:
    """A training step of a model on the meta device (it is spoiled for other uses). base: ids of the frozen model's own tensors.

    loss: (model, inputs) -> scalar; by default the `loss` of the model's output.
    """
    mode = FakeTensorMode()
    own, added = faked(model, base, mode)
    trained = [p for p in model.parameters() if p.requires_grad]
    ledger = Ledger()
    ledger.own(own, "weights")
    ledger.own(added, "adapters")
    weights, adapters = (
        sum(r.bytes for r in ledger.live.values() if r.part == part) for part in ("weights", "adapters")
    )
    for p in trained:
        p.register_post_accumulate_grad_hook(lambda p: ledger.label(p.grad, "gradients"))  # type: ignore[arg-type]
    head = watch_head(model, ledger)
    compute = loss or _own_loss
    try:
        with mode, ledger, sampled(ledger.stand_for):
            ledger.begin("forward")
            batch = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in inputs.items()}
            for _ in range(micro_batches):
                ledger.begin("forward")
                value = compute(model, batch)
                ledger.begin("backward")
                value.backward()
                del value
            gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
            ledger.begin("step")
            scratch = torch.zeros(optimizer.temporaries(trained, on_gpu=on_gpu), dtype=torch.uint8)
            del scratch
    finally:
        for hook in head:
            hook.remove()
    states = optimizer.states(trained) + method_states(model)
    peak = ledger.peak(lambda phase: states)
    return Trace(peak, weights, adapters, gradients, states, ledger.flops, ledger.moved, ledger.operations)


def method_states(model: nn.Module) -> int:
    """Bytes that the methods keep in the optimizer's state."""
    return 4 * sum(t.method.kept_in_optimizer(t) for layer in layers_of(model).values() for t in layer.active)


def _own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def faked(model: nn.Module, base: set[int], mode: FakeTensorMode) -> tuple[list[Tensor], list[Tensor]]:
    """Give every parameter and buffer of a meta model a device, without data. Returns those of the base, and the others."""
    memo: dict[int, tuple[Tensor, Tensor]] = {}  # the meta tensor is kept: its id must not be used again

    def fake(t: Tensor) -> Tensor:
        if id(t) not in memo:
            plain = t.detach() if t.device.type == "meta" else t.detach().to("meta")
            made: Tensor = FakeTensor(mode, plain, torch.device("cpu"))
            if isinstance(t, nn.Parameter):
                made = nn.Parameter(made, requires_grad=t.requires_grad)
            memo[id(t)] = (made, t)
        return memo[id(t)][0]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: fake(t) for name, t in held.items() if t is not None})  # type: ignore[misc, arg-type]
    own = [made for key, (made, _) in memo.items() if key in base]
    return own, [made for key, (made, _) in memo.items() if key not in base]


def watch_head(model: nn.Module, ledger: Ledger) -> list[Any]:
    """From the output head on, tensors as wide as its output count as logits."""

    def begin(module: nn.Module, inputs: Any, output: Any) -> None:
        passed_on = bool(inputs) and output is inputs[0]  # by the lean loss, which calls the head later
        if isinstance(output, Tensor) and output.dim() > 1 and not passed_on:
            ledger.width = output.shape[-1]
            ledger.label(output, "logits")

    hooks = []
    for name in head_names(model):
        hooks.append(model.get_submodule(name).register_forward_hook(begin))
    return hooks
