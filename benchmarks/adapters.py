"""One table for all methods on SmolLM2's shapes: what each trains and stores, and what its start, step, merge and switch cost.

    python benchmarks/adapters.py                       # every registered method that acts on layers
    python benchmarks/adapters.py lora dora --rounds 3

All methods sit on one model under names of their own, and every round times each of them once, so that a change of the machine's
speed meets all alike. Times and saved bytes are ratios to LoRA's (rank 8) of the same round; the table holds medians. Saved bytes
are what autograd keeps from the forward to the backward pass beside parameters and buffers. Weights are random: speed does not
depend on them. Writes results/adapters.json and results/adapters.md.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, about, smollm2, write

import loratory as lt
from loratory.catalogue.properties import kept_bytes
from loratory.methods.registry import registered

REFERENCE = "lora"
CONVOLUTIONS = ("convlora",)  # serve no linear layer
MADE_AGAIN = ("loldu", "lora-xs", "salt", "svfit")  # basis="weight" leaves what follows from the weights out of files
SLOW = 1.5  # times LoRA's step, above which the table says what takes the time
TERMS = {
    "loca": "the out x in update is made from its cosines and freed, forward and backward",
    "loldu": "rank = min(out, in) by default, so that its two bases are products as large as the layer's own",
    "nola": "its random bases, 512 rank (in + out) numbers a layer, are drawn again in each pass (basis='memory' keeps them)",
    "randlora": "its bases scaled are as many numbers as the weight, in each pass",
    "salt": "its default rank 256 and the singular bases are products nearly as large as the layer's own",
    "snella": "the out x in kernel is made and freed, forward and backward",
    "svfit": "rank = min(out, in) by default, so that its two bases are products as large as the layer's own",
    "tlora": "its in x in transform is made from its cores and applied beside the layer, forward and backward",
}


def layer_methods() -> list[str]:
    """The registered methods that act on layers, the reference first."""
    kinds = {n: cls for n, cls in registered().items() if cls.trains == "factors" and cls.acts_on == "layers"}
    names = [n for n in kinds if n not in CONVOLUTIONS]
    return [REFERENCE, *(n for n in sorted(names) if n != REFERENCE)]


def attach(model: Any, name: str, batch: dict[str, torch.Tensor]) -> float:
    """Attach a method with its defaults (LoRA: rank 8) to all linear layers; seconds of the start, statistics included."""
    began = time.perf_counter()
    needs = sorted(registered()[name]().needs)
    options: dict[str, Any] = {"seen": lt.collect(model, [batch], what=needs)} if needs else {}
    if name == REFERENCE:
        options["rank"] = 8
    lt.adapt(model, name, name=key(name), **options)
    return time.perf_counter() - began


def key(name: str) -> str:
    """An adapter name for a method."""
    return f"m-{name}"


def saved_bytes(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Bytes kept for the backward pass, which is run too."""
    losses: list[torch.Tensor] = []
    kept = kept_bytes(model, lambda: losses.append(model(**batch).loss))
    losses[0].backward()
    return kept


def step_seconds(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward and backward pass and an AdamW step."""
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=0.0))
    began = time.perf_counter()
    model(**batch).loss.backward()
    optimizer.step()
    took = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return took


def file_bytes(model: Any, name: str) -> int:
    """Bytes of an adapter's folder."""
    with tempfile.TemporaryDirectory() as folder:
        lt.save(model, folder, name=name)
        return sum(f.stat().st_size for f in Path(folder).iterdir())


def measure(names: list[str], layers: int, rows: int, tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Figures of each method."""
    model = smollm2(layers).train()
    ids = torch.randint(0, 49152, (rows, tokens))
    batch = {"input_ids": ids, "labels": ids}
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        start = attach(model, name, batch)
        lt.use(model, key(name))
        stored = file_bytes(model, key(name))
        found[name] = {"trained": lt.summary(model).trained, "file_bytes": stored, "start_seconds": start}
        if name in MADE_AGAIN:
            lt.adapt(model, name, name="without-bases", basis="weight")
            found[name]["file_bytes_without_bases"] = file_bytes(model, "without-bases")
            lt.detach(model, "without-bases")
        print(f"{name}: {found[name]['trained']:,} trained numbers, start {start:.2f} s", flush=True)
    times: dict[str, dict[str, list[float]]] = {n: {"step": [], "saved": [], "merge": [], "switch": []} for n in names}
    for round_ in range(rounds + 1):  # the first one is a warm-up
        for name in names:
            began = time.perf_counter()
            lt.use(model, key(name))
            switch = time.perf_counter() - began
            seconds, kept = step_seconds(model, batch), saved_bytes(model, batch)
            model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            lt.merge(model)
            merge = time.perf_counter() - began
            lt.unmerge(model)
            if round_:
                for field, value in zip(times[name], (seconds, kept, merge, switch), strict=True):
                    times[name][field].append(value)
        print(f"round {round_} of {rounds}", flush=True)
    reference = times[REFERENCE]
    for name in names:
        own = times[name]
        found[name] |= {
            "step_ratio": ratio(own["step"], reference["step"]),
            "saved_ratio": ratio(own["saved"], reference["saved"]),
            "step_seconds": statistics.median(own["step"]),
            "saved_bytes": int(statistics.median(own["saved"])),
            "merge_seconds": statistics.median(own["merge"]),
            "switch_seconds": statistics.median(own["switch"]),
        }
    return found


def ratio(own: list[float], reference: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, reference, strict=True))


def table(found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    head = (
        "| method | trained | file (MB) | start (s) | step / LoRA's | saved bytes / LoRA's | merge (s) | switch (ms) |"
    )
    rows = [
        f"| {name} | {f['trained']:,} | {megabytes(f)} | {f['start_seconds']:.2f} | {f['step_ratio']:.2f} | "
        f"{f['saved_ratio']:.2f} | {f['merge_seconds']:.2f} | {1000 * f['switch_seconds']:.1f} |"
        for name, f in found.items()
    ]
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows])


def megabytes(figures: dict[str, Any]) -> str:
    """The file's size, and the one without bases."""
    bare = figures.get("file_bytes_without_bases")
    return f"{figures['file_bytes'] / 1e6:.2f}" + (f" ({bare / 1e6:.2f})" if bare else "")


def reasons(found: dict[str, dict[str, Any]]) -> str:
    """What takes the time of the steps far above LoRA's."""
    slow = [name for name, f in found.items() if f["step_ratio"] > SLOW]
    lines = [f"- {name}: {TERMS.get(name, 'not known')}" for name in slow]
    return (
        f"\nSteps above {SLOW} times LoRA's, and the term of the mathematics that takes the time:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="registered names; default: all that act on layers")
    parser.add_argument("--layers", type=int, default=30, help="decoder layers (SmolLM2-135M has 30)")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    names = list(dict.fromkeys([REFERENCE, *a.methods])) if a.methods else layer_methods()
    with tempfile.TemporaryDirectory() as cache:  # every decomposition is made here, none is read from the disk
        os.environ["LORATORY_CACHE"] = cache
        found = measure(names, a.layers, a.rows, a.tokens, a.rounds)
    command = (
        f"python benchmarks/adapters.py --layers {a.layers} --rows {a.rows} --tokens {a.tokens} --rounds {a.rounds}"
    )
    record = {**about(command), "methods": found}
    text = (
        f"# All methods on SmolLM2's shapes\n\n`{record['command']}`, {record['date']}, {record['machine']}, Python "
        f"{platform.python_version()}, torch {torch.__version__}. Medians of {a.rounds} interleaved rounds; each method with its "
        f"defaults (LoRA: rank 8) on all linear layers. In brackets: files with basis='weight', without the bases.\n\n{table(found)}\n{reasons(found)}"
    )
    write(a.out, "adapters", record, text)
    print(table(found))


if __name__ == "__main__":
    main()
