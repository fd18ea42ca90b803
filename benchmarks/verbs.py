"""What the verbs around training cost beside PEFT's: import, adapt, save, load, merge, switch.

    python benchmarks/verbs.py

Every round does each verb once with either library, on LoRA of rank 8 for all linear layers: adapting a 32-layer 7B Llama on the meta
device, the others on SmolLM2-135M's shapes with random weights. The table holds medians of the rounds, and of the ratios within a
round, of wall-clock and of processor seconds. Imports are those after `import torch`, in processes of their own. Writes
results/verbs.json and results/verbs.md.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from record import RESULTS, about, head, smollm2, told, write

import loratory as lt

VERBS = ("import", "adapt", "save", "load", "merge", "switch")
CLOCKS = {"seconds": "times_faster", "cpu_seconds": "cpu_times_less"}
IMPORT = (
    "import torch, time; wall, cpu = time.perf_counter(), time.process_time(); import {}; "
    "print(time.perf_counter() - wall, time.process_time() - cpu)"
)
Spent = dict[str, float]  # by clock
WHY = """`merge` does more here: it runs the model on a batch before and after and compares, refuses numbers that are not finite, and keeps the
base's own weights for `unmerge`; PEFT adds the update in place. `save` waits until its files are on the disk."""


def llama_7b() -> Any:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=32))


def settings() -> peft.LoraConfig:
    return peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)


def timed(act: Callable[[], Any]) -> tuple[Spent, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    made = act()
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}, made


def imported(name: str) -> Spent:
    done = subprocess.run([sys.executable, "-c", IMPORT.format(name)], capture_output=True, text=True, check=True)
    return dict(zip(CLOCKS, map(float, done.stdout.split()[-2:]), strict=True))


def ours(place: Path) -> dict[str, Spent]:
    model = llama_7b()
    took = {"import": imported("loratory"), "adapt": timed(lambda: lt.adapt(model, lt.LoRA(rank=8)))[0]}
    model = smollm2()
    lt.adapt(model, lt.LoRA(rank=8), name="first")
    for p in lt.trained(model).values():
        torch.nn.init.normal_(p, std=0.02)
    took["save"] = timed(lambda: lt.save(model, place / "ours", name="first"))[0]
    fresh = smollm2()
    took["load"] = timed(lambda: lt.load(fresh, place / "ours"))[0]
    took["merge"] = timed(lambda: lt.merge(fresh, keep_base=False))[0]
    lt.adapt(model, lt.LoRA(rank=8), name="second")
    took["switch"] = timed(lambda: lt.use(model, "first"))[0]
    return took


def theirs(place: Path) -> dict[str, Spent]:
    model = llama_7b()
    took = {"import": imported("peft"), "adapt": timed(lambda: peft.get_peft_model(model, settings()))[0]}
    adapted = peft.get_peft_model(smollm2(), settings(), adapter_name="default")
    took["save"] = timed(lambda: adapted.save_pretrained(str(place / "theirs")))[0]
    fresh = smollm2()
    took["load"], loaded = timed(lambda: peft.PeftModel.from_pretrained(fresh, str(place / "theirs")))
    took["merge"] = timed(lambda: loaded.merge_and_unload())[0]  # type: ignore[operator]
    adapted.add_adapter("second", settings())
    adapted.set_adapter("second")
    took["switch"] = timed(lambda: adapted.set_adapter("default"))[0]
    return took


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and processor seconds of either side and their ratios, by verb."""
    sides: dict[str, list[dict[str, Spent]]] = {"loratory": [], "peft": []}
    for round_ in range(rounds + 1):  # the first one is a warm-up
        for side, run in (
            (("loratory", ours), ("peft", theirs)) if round_ % 2 else (("peft", theirs), ("loratory", ours))
        ):
            with tempfile.TemporaryDirectory() as place:
                found = run(Path(place))
            if round_:
                sides[side].append(found)
        print(f"round {round_} of {rounds}", flush=True)
    return {verb: compared(verb, sides) for verb in VERBS}


def compared(verb: str, sides: dict[str, list[dict[str, Spent]]]) -> dict[str, float]:
    row = {}
    for clock, ratio in CLOCKS.items():
        pairs = [(a[verb][clock], b[verb][clock]) for a, b in zip(sides["loratory"], sides["peft"], strict=True)]
        row[f"loratory_{clock}"] = statistics.median(a for a, _ in pairs)
        row[f"peft_{clock}"] = statistics.median(b for _, b in pairs)
        row[ratio] = statistics.median(b / a for a, b in pairs)
    return row


def shown(table: dict[str, dict[str, float]]) -> str:
    heads = ["verb", "Loratory (s)", "PEFT (s)", "times faster"]
    heads += ["Loratory, processor (s)", "PEFT, processor (s)", "times less"]
    rows = [
        f"| {verb} | {row['loratory_seconds']:.4f} | {row['peft_seconds']:.4f} | {row['times_faster']:.1f} | "
        f"{row['loratory_cpu_seconds']:.4f} | {row['peft_cpu_seconds']:.4f} | {row['cpu_times_less']:.1f} |"
        for verb, row in table.items()
    ]
    return "\n".join([*head(heads), *rows])


def text(record: dict[str, Any]) -> str:
    return (
        f"# The verbs around training, beside PEFT\n\n{told(record)}. LoRA of rank 8 on all linear layers: adapt on a "
        f"32-layer 7B Llama on the meta device, the others on SmolLM2-135M's shapes. Medians of {record['rounds']} interleaved rounds.\n\n"
        f"{shown(record['verbs'])}\n\n{WHY}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    table = measure(a.rounds)
    command = f"python benchmarks/verbs.py --rounds {a.rounds}"
    record = {**about(command, "transformers", "peft"), "rounds": a.rounds, "verbs": table}
    write(a.out, "verbs", record, text(record))
    print(shown(table))


if __name__ == "__main__":
    main()
