"""Every tensor that a piece of code allocates, with the moment it is freed: run on fake tensors, which have shapes and no data."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from loratory.plan.kernels import workspace

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "temporaries")


class Record:
    """One allocation."""

    __slots__ = ("bytes", "part", "recomputed")

    def __init__(self, bytes: int, part: str, recomputed: bool = False) -> None:
        self.bytes, self.part, self.recomputed = bytes, part, recomputed


@dataclass(frozen=True)
class Peak:
    """The moment at which most was alive."""

    bytes: int
    parts: dict[str, int]
    phase: str  # forward, backward or step


class Ledger(TorchDispatchMode):
    """Notes what each operation allocates. `live` holds the records by storage; `events` every allocation and release in order.

    A value that code asks of a tensor (`.item()`, `if mask.all()`) is answered with 0, False: the general path is taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, Record] = {}
        self.events: list[tuple[Record, int]] = []  # +1 allocated, -1 released
        self.marks: list[tuple[int, str]] = []  # index of an event, and the phase that begins there
        self.width: int | None = None  # last dimension of the output head: what has it is part of the logits
        self.flops: dict[torch.dtype, int] = {}
        self.moved = 0  # bytes read and written by operations without a product
        self.operations = 0
        self.times = 1  # how many operations each one stands for
        self._watches: dict[int, Any] = {}
        self._recomputing = False

    def stand_for(self, times: int) -> None:
        """From now on each operation stands for so many."""
        self.times = times

    # -- what is alive -------------------------------------------------------------------------------------------------

    def own(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that are there already."""
        for t in tensors:
            self._see(t, part)

    def label(self, tensor: Tensor, part: str) -> None:
        """Put a live tensor under another part."""
        record = self.live.get(tensor.untyped_storage()._cdata)
        if record is not None:
            record.part = part

    def begin(self, phase: str) -> None:
        """A phase starts; what is still alive at the end of the forward pass was kept for the backward pass."""
        self.marks.append((len(self.events), phase))
        if phase == "backward":
            self._keep(_any)

    def restart(self) -> None:
        """Forget how it came to what is alive now."""
        self.events = [(record, 1) for record in self.live.values()]
        self.marks = []

    def peak(self, more: Callable[[str], int] = lambda phase: 0) -> Peak:
        """The largest sum; `more` adds bytes that a phase holds besides."""
        total, best, best_at, phase, best_phase = 0, -1, 0, "", ""
        marks = dict(self.marks)
        for index, (record, sign) in enumerate(self.events):
            phase = marks.get(index, phase)
            total += sign * record.bytes
            if total + more(phase) > best:
                best, best_at, best_phase = total + more(phase), index, phase
        parts = dict.fromkeys(PARTS, 0)
        for record, sign in self.events[: best_at + 1]:
            parts[record.part] += sign * record.bytes
        parts["optimizer"] += more(best_phase)
        return Peak(max(best, 0), parts, best_phase)

    # -- every operation -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: False}.get(args[0].dtype, 0)
        out = func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return out
        recomputing = self._phase == "backward" and torch.is_grad_enabled()
        if self._recomputing and not recomputing:
            self._keep(_is_recomputed)
        self._recomputing = recomputing
        fresh = False
        for t in tree_iter(out):
            if _is_empty(t):
                fresh |= self._see(t, self._part(t), recomputing)
        inside = workspace(func, args, out)
        if inside:
            record = Record(inside, "temporaries")
            self.events += [(record, 1), (record, -1)]
        self._count(func, args, kwargs, out, fresh)
        return out

    @property
    def _phase(self) -> str:
        return self.marks[-1][1] if self.marks else ""

    def _part(self, t: Tensor) -> str:
        return "logits" if self.width is not None and t.dim() > 1 and t.shape[-1] == self.width else "temporaries"

    def _see(self, t: Tensor, part: str, recomputed: bool = False) -> bool:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.live:
            return False
        record = Record(storage.nbytes(), part, recomputed)
        self.live[key] = record
        self.events.append((record, 1))
        self._watches[key] = weakref.ref(storage, partial(self._release, key))
        return True

    def _release(self, key: int, _: Any) -> None:
        record = self.live.pop(key)
        del self._watches[key]
        self.events.append((record, -1))

    def _keep(self, chosen: Callable[[Record], bool]) -> None:
        for record in self.live.values():
            if record.part == "temporaries" and chosen(record):
                record.part = "activations"

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, fresh: bool) -> None:
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            dtype = next(t.dtype for t in tree_iter((args, kwargs)) if isinstance(t, Tensor))
            self.flops[dtype] = self.flops.get(dtype, 0) + self.times * formula(*args, **kwargs, out_val=out)
            self.operations += self.times
        elif fresh or func._schema.is_mutable:
            seen = [t for t in tree_iter((args, kwargs, out)) if _is_empty(t)]
            self.moved += self.times * sum(t.numel() * t.element_size() for t in seen)
            self.operations += self.times


def _any(record: Record) -> bool:
    return True


def _is_recomputed(record: Record) -> bool:
    return record.recomputed


def _is_empty(t: object) -> bool:
    """Whether this is a tensor without data."""
    return isinstance(t, FakeTensor) or (isinstance(t, Tensor) and t.device.type == "meta")
