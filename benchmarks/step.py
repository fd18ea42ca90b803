"""What LoRA (rank 8, all linear layers) adds to the frozen model's own forward and backward pass, beside PEFT.

    python benchmarks/step.py
    python benchmarks/step.py --rounds 5 --shapes smollm2
    python benchmarks/step.py --profile     # where the time goes; added to what stands in results/step.json
    python benchmarks/step.py --tables      # results/step.md again from results/step.json

Shapes: SmolLM2-135M's body, and a BERT of 6 layers 384 wide; batches of 1 x 16 and 4 x 128 tokens; float32, and bf16 by autocast. Arms: the
frozen model with gradients through all of it, the limit that no adapter gets below; PEFT; ours; ours with
lt.lean_activations; and, to see what each part gives, ours with every layer by itself. Beside them stand LoRA's products alone: the six of
each layer on tensors that lie ready, without autograd, which is what its arithmetic costs here. Every round times each arm once, in an order
that turns. The overhead is (arm - frozen) / frozen of the same round, and of the medians; wall-clock and processor seconds. Saved
bytes are what autograd keeps for the backward pass beside parameters and buffers. Weights are random. The profile gives the milliseconds
that each of torch's operations takes by itself in a step, beyond what the frozen model's take, by torch.profiler, whose own cost is in them.
Writes results/step.json and results/step.md.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from record import RESULTS, about, read, smollm2, told, write

import loratory as lt
from loratory.catalogue.properties import kept_bytes
from loratory.runtime.layer import layers_of
from loratory.runtime.route import low_rank_route

BATCHES = ((1, 16), (4, 128))
FROZEN, PEFT, OURS, LEAN, ALONE = "frozen", "PEFT", "ours", "ours, lean activations", "ours, each layer alone"
PRODUCTS = "LoRA's products alone"
ARMS = (FROZEN, PEFT, OURS, LEAN, ALONE, PRODUCTS)
RANK = 8
AIM = 0.6  # of PEFT's overhead
OPERATIONS = 8  # of a profile that are shown by name
WHY = """Why. Where the products alone come to more than the aim, it is out of reach of any code that takes them one by one. What
is left beside the products is the cost of the nodes in autograd and Python (four groups of layers a block), which PEFT pays as well.

Tried, and kept: layers that share their input as one node, the scale as a number, fewer checks, and under bf16 one cast of a weight for
both passes. Overheads of one day differ, since the machine is shared."""


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


SHAPES: dict[str, Callable[[], Any]] = {"smollm2": lambda: smollm2().model, "6 x 384": bert}


def arm(name: str, build: Callable[[], Any]) -> Any:
    """A model in training mode; all arms of a shape have the same weights."""
    model = build().train().requires_grad_(False)
    if name == PEFT:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear"))
    if name == FROZEN:
        return model
    lt.adapt(model, lt.LoRA(rank=RANK, alpha=16))
    if name == LEAN:
        lt.lean_activations(model)
    if name == ALONE:
        for layer in layers_of(model).values():
            layer.route = low_rank_route
    return model


def products(model: Any, tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """The six thin products of each adapted layer: h = x A^T, y += h B^T, and of the gradients B, h, A, x."""
    shapes = [tuple(layer.site.shape) for layer in layers_of(model).values()]
    y = {outputs: torch.randn(tokens, outputs, dtype=dtype) for outputs, _ in shapes}
    x = {inputs: torch.randn(tokens, inputs, dtype=dtype) for _, inputs in shapes}
    A = {n: torch.randn(RANK, n, dtype=dtype) for n in x}
    B = {n: torch.randn(n, RANK, dtype=dtype) for n in y}
    h = torch.randn(tokens, RANK, dtype=dtype)

    def run() -> None:
        for outputs, inputs in shapes:
            torch.mm(x[inputs], A[inputs].mT, out=h)
            y[outputs].addmm_(h, B[outputs].mT, beta=0.5)  # so that nothing grows
        for outputs, inputs in reversed(shapes):
            g = torch.mm(y[outputs], B[outputs])
            torch.mm(y[outputs].mT, h)
            torch.mm(g.mT, x[inputs])
            x[inputs].addmm_(g, A[inputs], alpha=1e-9)  # as good as nothing, at the same cost

    return run


def loss(model: Any, x: torch.Tensor, bf16: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(inputs_embeds=x).last_hidden_state.float().square().mean()


def measure(build: Callable[[], Any], rows: int, tokens: int, bf16: bool, rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of each round, and saved bytes, of each arm."""
    models = {name: arm(name, build) for name in ARMS if name != PRODUCTS}
    alone = products(models[OURS], rows * tokens, torch.bfloat16 if bf16 else torch.float32)
    x = torch.randn(rows, tokens, models[FROZEN].config.hidden_size).requires_grad_()
    found: dict[str, dict[str, Any]] = {name: {"wall": [], "cpu": [], "saved": 0} for name in ARMS}
    for name, model in models.items():
        found[name]["saved"] = kept_bytes(model, lambda model=model: loss(model, x, bf16))  # type: ignore[misc]
        gc.collect()
    times = max(1, 512 // (rows * tokens) // 4)  # steps in a row, so that a short step is timed too
    for round_ in range(rounds + 1):
        turn = round_ % len(ARMS)
        for name in ARMS[turn:] + ARMS[:turn]:
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(times):
                if name == PRODUCTS:
                    alone()
                    continue
                loss(models[name], x, bf16).backward()
                models[name].zero_grad(set_to_none=True)
                x.grad = None
            if round_:  # the first one is a warm-up
                found[name]["wall"].append((time.perf_counter() - wall) / times)
                found[name]["cpu"].append((time.process_time() - cpu) / times)
    return found


def profile(build: Callable[[], Any], rows: int, tokens: int, bf16: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by operation, without those it calls, of each arm: medians of the rounds."""
    models = {name: arm(name, build) for name in (FROZEN, PEFT, OURS)}
    x = torch.randn(rows, tokens, models[FROZEN].config.hidden_size).requires_grad_()
    times = max(1, 512 // (rows * tokens) // 4)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for round_ in range(rounds + 1):
        for name, model in models.items():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                for _ in range(times):
                    loss(model, x, bf16).backward()
                    model.zero_grad(set_to_none=True)
                    x.grad = None
            if round_:
                each = {event.key: event.self_cpu_time_total / 1e3 / times for event in seen.key_averages()}
                found[name].append(each)
    return {
        name: {key: statistics.median(each.get(key, 0.0) for each in all_) for key in set().union(*all_)}
        for name, all_ in found.items()
    }


def profiled(results: list[dict[str, Any]]) -> str:
    """A table for each setting: operations that take more than in the frozen model, and all others together."""
    parts = []
    for each in results:
        frozen, peft, ours = (each["milliseconds"][name] for name in (FROZEN, PEFT, OURS))
        more = {
            key: (peft.get(key, 0.0) - frozen.get(key, 0.0), ours.get(key, 0.0) - frozen.get(key, 0.0))
            for key in {*frozen, *peft, *ours}
        }
        first = sorted(more, key=lambda key: -max(map(abs, more[key])))[:OPERATIONS]
        lines = [
            f"{each['shapes']}, {each['batch']}, {each['numbers']}:",
            "",
            "| operation | PEFT's (ms) | ours (ms) |",
            "|---|---|---|",
        ]
        lines += [f"| `{key}` | {more[key][0]:+.1f} | {more[key][1]:+.1f} |" for key in first]
        rest = [sum(pair[i] for key, pair in more.items() if key not in first) for i in (0, 1)]
        whole = [sum(pair[i] for pair in more.values()) for i in (0, 1)]
        nodes, thin = (
            sum(more[key][1] for key in more if key in keys) / whole[1]
            for keys in (("_LowRankLinears", "_LowRankLinearsBackward"), ("aten::mm", "aten::addmm_"))
        )
        lines += [
            f"| all others | {rest[0]:+.1f} | {rest[1]:+.1f} |",
            f"| together | {whole[0]:+.1f} | {whole[1]:+.1f} |",
            "",
            f"Of ours the products (`mm`, `addmm_`) are {thin:.0%}, our nodes in Python and autograd themselves (`_LowRankLinears`) {nodes:.0%}.",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def figures(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each arm: medians, its overhead, and the overhead and the saved bytes as ratios to PEFT's."""
    frozen, peft = found[FROZEN], found[PEFT]
    out: dict[str, dict[str, float]] = {}
    for name, each in found.items():
        row: dict[str, float] = {"saved": each["saved"], "saved_ratio": each["saved"] / peft["saved"]}
        for clock in ("wall", "cpu"):
            less = 0 if name == PRODUCTS else 1
            over = statistics.median(a - less * b for a, b in zip(each[clock], frozen[clock], strict=True))
            theirs = statistics.median(a - b for a, b in zip(peft[clock], frozen[clock], strict=True))
            row[clock] = statistics.median(each[clock])
            row[f"{clock}_overhead"] = over / statistics.median(frozen[clock])
            row[f"{clock}_ratio"] = over / theirs
        out[name] = row
    return out


def shown(results: list[dict[str, Any]]) -> str:
    lines = [
        "| shapes | batch | numbers | arm | step (ms) | processor (ms) | overhead | of PEFT's | processor overhead | of PEFT's | saved (MiB) | of PEFT's |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        for name, f in each["figures"].items():
            lines.append(
                f"| {each['shapes']} | {each['batch']} | {each['numbers']} | {name} | {1e3 * f['wall']:.1f} | {1e3 * f['cpu']:.1f} | "
                f"{f['wall_overhead']:.1%} | {f['wall_ratio']:.2f} | {f['cpu_overhead']:.1%} | {f['cpu_ratio']:.2f} | "
                f"{f['saved'] / 2**20:.1f} | {f['saved_ratio']:.2f} |"
            )
    return "\n".join(lines)


def verdicts(results: list[dict[str, Any]]) -> str:
    """Where the aim is met, and where not: how much of the overhead LoRA's own products are."""
    met, missed = [], []
    for each in results:
        ours, bare, peft = (each["figures"][name] for name in (OURS, PRODUCTS, PEFT))
        where = f"{each['shapes']}, {each['batch']}, {each['numbers']}: {ours['cpu_ratio']:.2f}"
        if ours["cpu_ratio"] <= AIM:
            met.append(where)
            continue
        base = each["figures"][FROZEN]["cpu"]
        parts = [1e3 * base * f["cpu_overhead"] for f in (bare, ours, peft)]
        missed.append(
            "{}, of {:.1f} ms for the products alone, {:.1f} ms ours and {:.1f} ms PEFT's".format(where, *parts)
        )
    ratios, saved = ([each["figures"][OURS][key] for each in results] for key in ("cpu_ratio", "saved_ratio"))
    text = (
        f"Aim: at most {AIM} of PEFT's overhead (processor seconds), saved bytes at most PEFT's. What came: {min(ratios):.2f} to "
        f"{max(ratios):.2f}, and saved bytes {min(saved):.2f} to {max(saved):.2f}.\n\nMet in {len(met)} of {len(results)} settings: {'; '.join(met) or 'nowhere'}."
    )
    if not missed:
        return text
    return f"{text}\n\nMissed:\n\n" + "\n".join(f"- {each}" for each in missed) + f"\n\n{WHY}"


def text(record: dict[str, Any]) -> str:
    results = record["results"]
    traced = record.get("profile")
    where = f"\n## Profile\n\n{told(traced)}.\n\n{profiled(traced['results'])}\n" if traced else ""
    return (
        f"# What LoRA adds to a step\n\n{told(record)}.\n\n{shown(results)}\n\n"
        "Overhead: seconds over the frozen model's own forward and backward pass, as a share of that; medians of the rounds' differences.\n\n"
        f"{verdicts(results)}\n{where}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="only write the tables again from the JSON of a run")
    parser.add_argument("--profile", action="store_true", help="only profile, and add that to the JSON of a run")
    a = parser.parse_args()
    command = f"python benchmarks/step.py --rounds {a.rounds}"
    if a.shapes != list(SHAPES):
        command += " --shapes " + " ".join(repr(name) for name in a.shapes)
    if a.profile:
        seen = []
        for name in a.shapes:
            for rows, tokens in BATCHES:
                for bf16 in (False, True):
                    row = {"shapes": name, "batch": f"{rows} x {tokens}", "numbers": "bf16" if bf16 else "float32"}
                    seen.append(row | {"milliseconds": profile(SHAPES[name], rows, tokens, bf16, a.rounds)})
                    print(profiled(seen[-1:]), flush=True)
        record = read(a.out, "step")
        record["profile"] = about(f"{command} --profile", "transformers", "peft") | {"results": seen}
        write(a.out, "step", record, text(record))
        return
    if a.tables:
        record = read(a.out, "step")
        write(a.out, "step", record, text(record))
        return
    results = []
    for name in a.shapes:
        for rows, tokens in BATCHES:
            for bf16 in (False, True):
                found = measure(SHAPES[name], rows, tokens, bf16, a.rounds)
                row = {"shapes": name, "batch": f"{rows} x {tokens}", "numbers": "bf16" if bf16 else "float32"}
                results.append(row | {"figures": figures(found), "runs": found})
                print(shown(results[-1:]), flush=True)
    record = about(command, "transformers", "peft") | {"results": results}
    write(a.out, "step", record, text(record))
    print(text(record))


if __name__ == "__main__":
    main()
