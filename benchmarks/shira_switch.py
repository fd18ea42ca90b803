"""Switching a sparse adapter by writing its entries, against fusing a LoRA into the weight, over layer widths.

    python benchmarks/shira_switch.py
    python benchmarks/shira_switch.py --widths 512 1024 --rounds 5

Square layers in float32; SHiRA at 1 % of the entries (drawn at random), LoRA of rank 32, as in the paper. Two comparisons:

    operation   a scatter of the adapter's numbers into the weight, against W += B A: with B A made first, and in one call (addmm)
    switch      from one adapter to the other: loratory.switch with all it does (old numbers written back, new ones kept, routes set),
                against W -= B A of the one and W += B A of the other, in one call each, which leaves rounding in the base

Every round times each once, so that a change of the machine's speed meets all alike; the ratios are those of the same round. The
table holds medians. Writes results/shira_switch.json and results/shira_switch.md.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, write
from torch import nn

import loratory as lt

WIDTHS = [512, 1024, 2048, 4096, 8192]


def measure(width: int, fraction: float, rank: int, rounds: int) -> dict[str, Any]:
    """Median seconds and ratios of one width."""
    torch.manual_seed(0)
    with torch.no_grad():
        layer: Any = nn.Linear(width, width, bias=False)
        model = nn.Sequential(layer)
        for name in ("a", "b"):
            lt.adapt(model, lt.SHiRA(fraction=fraction), "0", name=name)
            layer.loratory[name].v.normal_(std=0.01)
        lt.use(model)
        base = layer.weight.detach().clone()
        W = base.clone()  # LoRA's own, as fusing changes it for good
        loras = [(0.01 * torch.randn(width, rank), torch.randn(rank, width)) for _ in "ab"]
        places, v = layer.loratory["a"].places, layer.loratory["a"].v
        line, (B, A) = base.clone().view(-1), loras[0]
        lt.switch(model, "a")
        W.addmm_(*loras[0])
        state = {"at": 0}  # which adapter is in both

        def add() -> None:
            W.add_(B @ A)

        def addmm() -> None:
            W.addmm_(B, A, alpha=-1)

        def scatter() -> None:
            line.scatter_(0, places, v)

        def out_and_in() -> None:
            W.addmm_(*loras[state["at"]], alpha=-1)
            W.addmm_(*loras[1 - state["at"]])

        def switch() -> None:
            lt.switch(model, "ab"[1 - state["at"]])
            state["at"] = 1 - state["at"]

        jobs: dict[str, Callable[[], None]] = {
            "lora_add": add,
            "lora_addmm": addmm,
            "scatter": scatter,
            "lora_switch": out_and_in,
            "switch": switch,
        }
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for round_ in range(rounds + 2):  # the first two are a warm-up
            for name, job in jobs.items():
                began = time.perf_counter()
                job()
                if round_ >= 2:
                    times[name].append(time.perf_counter() - began)
        lt.switch(model)
        W.addmm_(*loras[state["at"]], alpha=-1)
        if not torch.equal(layer.weight, base):
            raise RuntimeError(f"at width {width} the base did not come back bit for bit")
        off = float((W - base).abs().max())

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    return {
        "width": width,
        "entries": places.numel(),
        "seconds": {name: statistics.median(found) for name, found in times.items()},
        "ratios": {
            "lora_add / scatter": ratio("lora_add", "scatter"),
            "lora_addmm / scatter": ratio("lora_addmm", "scatter"),
            "lora_switch / switch": ratio("lora_switch", "switch"),
        },
        "base_off_after_lora": off,
    }


def table(found: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    rows = [
        "| width | entries | scatter (ms) | B A, then add (ms) | in one call (ms) | over scatter | switch (ms) | LoRA out and in (ms) | over switch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for f in found:
        ms, r = {name: 1000 * seconds for name, seconds in f["seconds"].items()}, f["ratios"]
        rows.append(
            f"| {f['width']} | {f['entries']:,} | {ms['scatter']:.3f} | {ms['lora_add']:.2f} | {ms['lora_addmm']:.2f} | "
            f"{r['lora_add / scatter']:.1f}, {r['lora_addmm / scatter']:.1f} | {ms['switch']:.3f} | {ms['lora_switch']:.2f} | "
            f"{r['lora_switch / switch']:.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS)
    parser.add_argument("--fraction", type=float, default=0.01, help="SHiRA's share of the entries")
    parser.add_argument("--rank", type=int, default=32, help="LoRA's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    found, load = [], os.getloadavg()[0]
    for width in a.widths:
        found.append(measure(width, a.fraction, a.rank, a.rounds))
        print(table(found[-1:]).splitlines()[-1], flush=True)
    threads = torch.get_num_threads()
    command = f"python benchmarks/shira_switch.py --widths {' '.join(map(str, a.widths))} --fraction {a.fraction:g} --rank {a.rank} "
    record = about(command + f"--rounds {a.rounds} --threads {threads}") | {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}",
        "load_average_at_start": load,
        "widths": found,
    }
    text = (
        f"# Switching a sparse adapter against fusing a LoRA\n\n`{record['command']}`, {record['date']}, {record['machine']}, load average {load:.1f} at the start, Python "
        f"{platform.python_version()}, torch {torch.__version__}. Square float32 layers, SHiRA at {a.fraction:.0%} of the entries, LoRA of "
        f"rank {a.rank}; medians of {a.rounds} interleaved rounds, ratios of the same round (above 1: SHiRA is faster). Scatter: the bare "
        f"writing of the entries. Switch: `loratory.switch` from one adapter to another, old numbers written back and new ones kept; LoRA "
        "out and in: W -= B A, W += B A. After the switches the base had its bits again; after LoRA's it was off by up to "
        f"{max(f['base_off_after_lora'] for f in found):.1g}.\n\n{table(found)}\n"
    )
    write(a.out, "shira_switch", record, text)
    print(table(found))


if __name__ == "__main__":
    main()
