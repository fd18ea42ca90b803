"""`plan_job`: what a training step holds, by running it without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from loratory.plan.bound import bound_step
from loratory.plan.cards import budget, shown
from loratory.plan.clock import Rates
from loratory.plan.devices import blocks_of, on_each
from loratory.plan.file import file_bytes, saved_tensors
from loratory.plan.job import Job
from loratory.plan.ledger import Ledger
from loratory.plan.optimizers import find_optimizer
from loratory.plan.trace import Trace, Untraceable, trace_step
from loratory.runtime.layer import layers_of
from loratory.sites.packed import Packed

MOST_ROWS = 1 << 20  # where looking for the largest batch ends
LONGEST = 200  # characters of an error that a plan repeats


@dataclass(frozen=True)
class Plan:
    """What a run will need; sizes are bytes on each device. Prints as a table; `rows()` are for a dataframe."""

    job: Job = field(repr=False)
    peak: int  # of live tensors in a training step, once the optimizer has its states
    parts: dict[str, int]  # of the peak: weights, adapters, gradients, optimizer, activations, logits, temporaries
    phase: str  # where the peak is: forward, backward or step
    startup: dict[str, int]  # peaks before the first step: load, pack, attach
    adapter_bytes: int  # the adapter's file
    trained: int  # numbers
    total: int  # numbers of the base
    step_seconds: float | None  # one optimizer step on one device; None without a calibration
    untraced: str | None  # the error where the model's code could not be run without data; activations are a bound then
    trace: Trace = field(repr=False)
    rates: Rates | None = field(default=None, repr=False)

    @property
    def exact(self) -> bool:
        """Whether a step was traced; otherwise its activations are an upper bound."""
        return self.untraced is None

    @property
    def startup_peak(self) -> int:
        """Bytes before the first step, at most."""
        return max(self.startup.values())

    def rows(self) -> list[dict[str, Any]]:
        """One row for each part of the peak, for the start-up and the file."""
        rows = [{"what": part, "bytes": size, "share": size / self.peak} for part, size in self.parts.items()]
        rows.append({"what": "peak", "bytes": self.peak, "share": 1.0})
        rows += [{"what": f"start-up: {name}", "bytes": size, "share": None} for name, size in self.startup.items()]
        return [*rows, {"what": "adapter file", "bytes": self.adapter_bytes, "share": None}]

    def to_json(self) -> dict[str, Any]:
        """Every figure as plain values."""
        figures = {
            "peak": self.peak, "parts": self.parts, "phase": self.phase, "startup": self.startup, "startup_peak": self.startup_peak,
            "adapter_bytes": self.adapter_bytes, "trained": self.trained, "total": self.total, "step_seconds": self.step_seconds,
            "exact": self.exact, "untraced": self.untraced, "devices": self.job.devices, "sharding": self.job.sharding, "batch": self.job.batch,
        }  # fmt: skip
        return figures | {"settings": dict(self.job.settings)}

    def fits(self, card_or_bytes: str | int) -> bool:
        """Whether start-up and steps stay within a card or size."""
        return max(self.peak, self.startup_peak) <= budget(card_or_bytes)

    def largest_batch(self, card_or_bytes: str | int) -> int:
        """Rows of the largest batch whose step fits a card or size; 0 where not even one does."""
        limit = budget(card_or_bytes)
        return largest_batch(self.job, limit, {self.job.batch: self.peak})

    def __str__(self) -> str:
        lines = []
        for part, size in self.parts.items():
            lines.append(f"{part:14}{shown(size):>12}{size / self.peak:>7.0%}")
        at = {"forward": "in the forward pass", "backward": "in the backward pass", "step": "in the optimizer's step"}
        most = "peak" if self.exact else "at most"
        lines.append(f"{most:14}{shown(self.peak):>12}   {at[self.phase]}{self._devices()}")
        stages = ", ".join(f"{name} {shown(size)}" for name, size in self.startup.items())
        lines.append(f"{'start-up':14}{shown(self.startup_peak):>12}   {stages}")
        lines.append(f"{'adapter file':14}{shown(self.adapter_bytes):>12}")
        lines.append(f"trained: {self.trained:,} of {self.total:,} numbers")
        if self.step_seconds is not None:
            lines.append(f"a step: about {self.step_seconds:.3g} s ({self.rates.machine if self.rates else ''})")
        if not self.exact:
            lines.append(
                f"the model's code cannot be run without data ({self.untraced}), so activations are an upper bound: "
                "all inputs and outputs of its layers"
            )
        return "\n".join(lines)

    def _devices(self) -> str:
        return "" if self.job.devices == 1 else f", on each of {self.job.devices} devices ({self.job.sharding})"


def plan_job(job: Job, rates: Rates | None = None) -> Plan:
    """Plan one job. Raises ValueError for an optimizer whose memory is not known, and what building and attaching raise."""
    optimizer = find_optimizer(job.optimizer)
    model, base, startup = started(job)
    total = numbers(model, base)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors = saved_tensors(model) or {
        n: p for n, p in model.named_parameters() if id(p) not in base or p.requires_grad
    }
    adapter_bytes = file_bytes(tensors)
    blocks = blocks_of(model)
    if job.checkpointing:
        checkpoint(model)
    model.train()
    inputs, micro = job.inputs(job.batch), min(2, job.accumulation)
    untraced = None
    try:
        trace = trace_step(model, base, inputs, optimizer, micro_batches=micro, on_gpu=job.on_gpu, loss=job.loss)
    except Untraceable as error:
        untraced = (str(error).strip() or type(error).__name__).splitlines()[0][:LONGEST]
        model, base, _ = started(job)
        trace = bound_step(model, base, inputs, optimizer)
    parts = on_each(trace.peak.parts, trace.gradients, job.devices, job.sharding, blocks)
    seconds = None
    if rates is not None:
        share = job.accumulation / micro
        seconds = share * rates.seconds(trace.flops, trace.moved, trace.operations)
    return Plan(
        job=job, peak=sum(parts.values()), parts=parts, phase=trace.peak.phase, startup=startup, adapter_bytes=adapter_bytes,
        trained=trained, total=total, step_seconds=seconds, untraced=untraced, trace=trace, rates=rates,
    )  # fmt: skip


def started(job: Job) -> tuple[Any, set[int], dict[str, int]]:
    """The model ready to train, the ids of its base's tensors, and the peaks of loading, packing and attaching."""
    model = job.build()
    ledger = Ledger()
    ledger.own(held(model), "weights")
    startup = loading(model, job, sum(record.bytes for record in ledger.live.values()))
    base: set[int] = set()
    for name, act in (("pack", job.pack), ("attach", job.attach)):
        if act is None:
            continue
        if name == "attach":
            base = {id(t) for t in held(model)}
        ledger.begin(name)
        with ledger:
            model = act(model) or model
        startup[name] = ledger.peak().bytes
        ledger.restart()
    startup["attach"] += declared_start(model)
    return model, base, startup


def loading(model: nn.Module, job: Job, loaded: int) -> dict[str, int]:
    """Peaks of getting the weights into memory. Files are mapped, so their pages count while they are read."""
    weights = [p for p in model.parameters() if p.is_floating_point()]
    sizes = [4 * p.numel() for p in weights]
    found = {"unpack": sum(sizes) + job.file + 2 * max(sizes, default=0)} if job.unpacks else {}
    stored = torch.float32 if job.unpacks else job.stored
    converted = sum(p.numel() * stored.itemsize for p in weights if p.dtype != stored) if stored is not None else 0
    return {**found, "load": loaded + converted + (0 if job.unpacks else job.file)}


def held(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def declared_start(model: nn.Module) -> int:
    """Bytes of work space that the start of a layer needs, as its method declares it, beyond what its tensors show."""
    needs = [0]
    for layer in layers_of(model).values():
        if layer.site.kind == "block":
            continue
        outputs, inputs = layer.site.shape[-2:]
        needs += [4 * adapter.method.footprint(outputs, inputs).workspace for adapter in layer.adapters()]
    return max(needs)


def numbers(model: nn.Module, base: set[int]) -> int:
    """Numbers of the base; of a packed weight those it stands for."""
    packed = [m for m in model.modules() if isinstance(m, Packed)]
    stored = {id(t) for m in packed for t in m.stored().values()}
    weights = {id(m.stored()[m.names[0]]): m.outputs * m.inputs for m in packed}
    own = [p for p in model.parameters() if id(p) in base and id(p) not in stored]
    return sum(weights.values()) + sum(p.numel() for p in own)


def checkpoint(model: Any) -> None:
    """Recompute activations, as Trainer switches it on."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    name = next((n for n in names if hasattr(model, n)), None)
    if name is None:
        raise ValueError(f"a {type(model).__name__} cannot recompute its activations; leave gradient_checkpointing out")
    getattr(model, name)()


def largest_batch(job: Job, limit: int, known: Mapping[int, int] | None = None) -> int:
    """The largest batch whose peak is within `limit` bytes: from one guess by a straight line to the next, each planned."""
    peaks = dict(known or {})

    def peak(batch: int) -> int:
        if batch not in peaks:
            peaks[batch] = plan_job(replace(job, batch=batch)).peak
        return peaks[batch]

    if peak(1) > limit:
        return 0
    low = max(batch for batch, size in peaks.items() if size <= limit)
    high = min((batch for batch, size in peaks.items() if size > limit), default=None)
    while (high is None or high - low > 1) and low < MOST_ROWS:
        other = 2 * low if high is None else high
        slope = (peak(other) - peak(low)) / (other - low)
        guess = low + int((limit - peak(low)) / slope) if slope > 0 else 2 * low
        guess = max(low + 1, guess if high is None else min(guess, high - 1))
        for batch in {other, guess}:
            if peak(batch) <= limit:
                low = max(low, batch)
            else:
                high = batch if high is None else min(high, batch)
    return low
