"""What torch's CPU allocator itself reports, by torch.profiler: the measure that plans are compared with."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of these tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(model: Any) -> int:
    return bytes_of([*model.parameters(), *model.buffers()])


def rise(run: Callable[[], object]) -> int:
    """How far live bytes rise over what they were, at most, while this runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def live(model: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, accumulate: int = 1) -> int:
    """The most live bytes of training steps, the model's own tensors and the batch's included."""

    def steps() -> None:
        for _ in range(2):
            for _ in range(accumulate):
                loss = model(**batch).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return held(model) + bytes_of(batch.values()) + rise(steps)
