"""How long a step takes: its products at the rate of a measured one, its other operations at the rate of memory, and a fixed cost each."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

SHAPE = {"cpu": (256, 512, 1024), "cuda": (4096, 4096, 4096)}  # rows, inner, columns of the measured product
NUMBERS = {"cpu": 1 << 24, "cuda": 1 << 26}  # of the measured sum: too many for a cache
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDS = 5
LONG = 0.05  # seconds: as many calls are timed together as take so long


@dataclass(frozen=True)
class Rates:
    """What one machine does in a second."""

    machine: str  # what they hold for: device, torch, threads
    flops: dict[str, float]  # by number format: float32, bfloat16, float16
    bytes: float  # read and written by a sum
    overhead: float  # seconds of an operation on a few numbers

    def seconds(self, flops: Mapping[torch.dtype, int], moved: int, operations: int) -> float:
        """Seconds of a step."""
        slowest = min(self.flops.values())
        products = sum(n / self.flops.get(str(dtype).removeprefix("torch."), slowest) for dtype, n in flops.items())
        return products + moved / self.bytes + operations * self.overhead

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def machine(device: str) -> str:
    """What rates depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def measure(device: str = "cpu") -> Rates:
    """Time a product in each number format, a sum, and an operation on nothing much: about two seconds."""
    rows, inner, columns = SHAPE[device]
    flops = {}
    for dtype in FORMATS:
        a, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
        flops[str(dtype).removeprefix("torch.")] = (
            2 * rows * inner * columns / _fastest(partial(torch.matmul, a, b), device)
        )
    x, y = (torch.ones(NUMBERS[device], device=device) for _ in range(2))
    moved = (
        3 * 4 * NUMBERS[device] / _fastest(lambda: x.add_(y), device)
    )  # in place: a new block's first touch is not what is timed
    z = torch.ones(8, device=device)
    return Rates(machine(device), flops, moved, _fastest(lambda: z + z, device))


def _fastest(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call, the best of a few rounds of many; what takes long is timed once."""
    run()
    best, calls = _time(run, 1, device), 1
    if best > LONG:
        return best
    while _time(run, calls, device) < LONG and calls < 1 << 16:
        calls *= 2
    return min(_time(run, calls, device) / calls for _ in range(ROUNDS))


def _time(run: Callable[[], Any], calls: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
