"""How a training step grows: its time and memory over sequence length, rows, rank, adapters and layers, with fitted straight lines.

    python benchmarks/growth.py

A Llama of SmolLM2-135M's width with LoRA on all linear layers; one of the five is varied, the others stay at 128 tokens, 2 rows, rank 8, 1
adapter and 6 layers. Adapters: that many are attached, and one is active. The time, wall-clock and processor seconds, is of a
forward and backward pass and an AdamW step with all values in turn in each round, medians; memory is what autograd keeps for the
backward pass and, for adapters, the bytes of their tensors, gradients and optimizer states. R2 says how straight the line is: attention's scores grow with the square of the length.
Writes results/growth.json and results/growth.md.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, head, smollm2, told, write

import loratory as lt
from loratory.catalogue.properties import kept_bytes

AT = {"tokens": 128, "rows": 2, "rank": 8, "adapters": 1, "layers": 6}
VALUES = {
    "tokens": (64, 128, 256, 384, 512),
    "rows": (1, 2, 4, 6, 8),
    "rank": (4, 16, 32, 64, 96),
    "adapters": (1, 8, 16, 24, 32),
    "layers": (2, 4, 6, 9, 12),
}


class Case:
    """One point: a model, its batch and optimizer."""

    def __init__(self, tokens: int, rows: int, rank: int, adapters: int, layers: int) -> None:
        self.model = smollm2(layers).model.train()
        for i in range(adapters):
            lt.adapt(self.model, lt.LoRA(rank=rank), name=f"a{i}")
        lt.use(self.model, "a0")
        self.ids = torch.randint(0, 49152, (rows, tokens))
        self.optimizer = torch.optim.AdamW(lt.param_groups(self.model, lr=0.0))
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.ids).last_hidden_state.square().mean()

    def step(self) -> tuple[float, float]:
        """Seconds and processor seconds of a step."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.loss().backward()
        self.optimizer.step()
        took = time.perf_counter() - wall, time.process_time() - cpu
        self.optimizer.zero_grad(set_to_none=True)
        return took

    def kept(self) -> int:
        return kept_bytes(self.model, self.loss)

    def adapter_bytes(self) -> int:
        """Tensors of all adapters, and what training the active one holds beside them."""
        own = sum(p.nbytes for name, p in self.model.named_parameters() if ".loratory." in name)
        return own + 3 * sum(p.nbytes for group in self.optimizer.param_groups for p in group["params"])


def line(xs: list[float], ys: list[float]) -> dict[str, float]:
    """The straight line of least squares, and R2."""
    slope, intercept = statistics.linear_regression(xs, ys)
    mean = statistics.fmean(ys)
    rest = sum((y - slope * x - intercept) ** 2 for x, y in zip(xs, ys, strict=True))
    total = sum((y - mean) ** 2 for y in ys)
    return {"slope": slope, "intercept": intercept, "r2": 1 - rest / total if total else 1.0}


def measure(axis: str, rounds: int) -> dict[str, Any]:
    """Points and lines along one axis."""
    cases = {value: Case(**(AT | {axis: value})) for value in VALUES[axis]}
    for round_ in range(rounds + 1):
        for case in cases.values() if round_ % 2 else reversed(cases.values()):
            wall, cpu = case.step()
            if round_:  # the first one is a warm-up
                case.wall.append(wall)
                case.cpu.append(cpu)
    points: dict[str, list[float]] = {
        "seconds": [statistics.median(case.wall) for case in cases.values()],
        "cpu_seconds": [statistics.median(case.cpu) for case in cases.values()],
        "kept": [float(case.kept()) for case in cases.values()],
        "adapters": [float(case.adapter_bytes()) for case in cases.values()],
    }
    xs = [float(value) for value in cases]
    return {"values": xs, "points": points, "lines": {name: line(xs, ys) for name, ys in points.items()}}


def shown(found: dict[str, dict[str, Any]]) -> str:
    heads = ["over", "from - to", "ms a step: at first, at last", "slope (ms each)", "R2"]
    heads += ["processor ms: at first, at last", "slope (ms each)", "R2"]
    heads += ["kept (MiB): at first, at last", "slope (KiB each)", "R2"]
    heads += ["adapters, gradients, states (MiB)", "slope (KiB each)", "R2"]
    lines = head(heads)
    units = {"seconds": (1e-3, 1e-3), "cpu_seconds": (1e-3, 1e-3), "kept": (2**20, 2**10), "adapters": (2**20, 2**10)}
    for axis, each in found.items():
        points, fits = each["points"], each["lines"]
        cells = [axis, f"{each['values'][0]:.0f} - {each['values'][-1]:.0f}"]
        for name, (unit, per) in units.items():
            first, last = points[name][0] / unit, points[name][-1] / unit
            cells += [f"{first:,.1f}, {last:,.1f}", f"{fits[name]['slope'] / per:,.2f}", f"{fits[name]['r2']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    found = {}
    for axis in VALUES:
        found[axis] = measure(axis, a.rounds)
        print(shown({axis: found[axis]}).splitlines()[-1], flush=True)
    record = about(f"python benchmarks/growth.py --rounds {a.rounds}", "transformers") | {"at": AT, "found": found}
    text = (
        f"# How a step grows\n\n{told(record)}. The others stay at "
        + ", ".join(f"{value} {name}" if name != "rank" else f"rank {value}" for name, value in AT.items())
        + f".\n\n{shown(found)}\n\nSlopes are of straight lines by least squares over five values. Kept: for the backward pass, beside parameters.\n"
    )
    write(a.out, "growth", record, text)


if __name__ == "__main__":
    main()
