"""`plan_job`: the memory of a training step, from running it without data."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loratory.plan.job import Job
from loratory.plan.optimizers import find_optimizer
from loratory.plan.trace import Trace, trace_step
from loratory.sites.packed import Packed


@dataclass(frozen=True)
class Plan:
    """What a run will need. Sizes are bytes, on one device."""

    job: Job = field(repr=False)
    peak: int
    parts: dict[str, int]  # of the peak: weights, adapters, gradients, optimizer, activations, logits, temporaries
    phase: str  # where the peak is: forward, backward or step
    startup_peak: int
    adapter_bytes: int  # the file
    trained: int  # numbers
    total: int  # numbers of the base
    trace: Trace = field(repr=False)


def plan_job(job: Job) -> Plan:
    """Plan one job."""
    optimizer = find_optimizer(job.optimizer)
    model = job.build()
    base = {id(t) for t in (*model.parameters(), *model.buffers())}
    total = numbers(model)
    model = job.attach(model)
    if job.checkpointing:
        checkpoint(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.train()
    trace = trace_step(
        model, base, job.inputs(job.batch), optimizer, micro_batches=min(2, job.accumulation), loss=job.loss
    )
    return Plan(job, trace.peak.bytes, trace.peak.parts, trace.peak.phase, 0, 0, trained, total, trace)


def numbers(model: nn.Module) -> int:
    """Numbers of a model; of a packed weight those it stands for."""
    packed = [m for m in model.modules() if isinstance(m, Packed)]
    stored = {id(t) for m in packed for t in m.stored().values()}
    weights = {id(m.stored()[m.names[0]]): m.outputs * m.inputs for m in packed}
    return sum(weights.values()) + sum(p.numel() for p in model.parameters() if id(p) not in stored)


def checkpoint(model: Any) -> None:
    """Recompute activations, as Trainer switches it on."""
    name = next((n for n in ("activation_checkpointing_enable", "gradient_checkpointing_enable") if hasattr(model, n)), None)
    if name is None:
        raise ValueError(f"a {type(model).__name__} cannot recompute its activations; leave gradient_checkpointing out")
    getattr(model, name)()
