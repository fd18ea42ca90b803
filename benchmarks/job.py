"""The everyday job beside TRL: instruction tuning of SmolLM2-135M with LoRA on E2E, 8 rows a step; time and memory of a step.

    python benchmarks/job.py                 # every arm in turn, in rounds
    python benchmarks/job.py --arm fast      # one arm in this process; prints JSON
    python benchmarks/job.py --tables        # results/job.md again from results/job.json

All arms see the same tokens and labels, made by our task, in the same order with the same optimizer (AdamW at 2e-4, constant,
without decay), LoRA of rank 8 on all linear layers, float32 unless the arm says bf16 (autocast, as TRL's default). TRL runs at its
defaults (bf16, checkpointing), and without checkpointing in float32 padding-free (`trl best`), bf16 padding-free (`trl bf16`) and
float32 padded. Each arm is a process of its own. Seconds are medians over the steps after the first two. Losses are means over all
steps. Memory is the highest resident size while training above that after imports and model, whose weights are read once before,
since a mapped file is in memory only then. Each figure is compared with that of TRL's arm that has the least of it; ratios are of one
round. A loss more than 1 % off that arm's is marked. Writes results/job.json and results/job.md.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from plan import status
from record import RESULTS, about, head, read, told, write
from transformers import TrainerCallback

from loratory.tasks import make_task
from loratory.train.base import load_base

ROOT = Path(__file__).parents[1]
TRL: dict[str, dict[str, Any]] = {
    "trl default": {},
    "trl best": {"bf16": False, "gradient_checkpointing": False, "padding_free": True},
    "trl bf16": {"gradient_checkpointing": False, "padding_free": True},
    "trl padded": {"bf16": False, "gradient_checkpointing": False},
}
OURS: dict[str, dict[str, Any]] = {
    "fast": {"memory": "fast"},
    "fast packed": {"memory": "fast", "packing": True},
    "fast bf16": {"memory": "fast", "bf16": True},
    "fast bf16 packed": {"memory": "fast", "bf16": True, "packing": True},
    "balanced": {"memory": "balanced"},
    "balanced bf16": {"memory": "balanced", "bf16": True},
    "lean": {"memory": "lean"},
    "lean packed": {"memory": "lean", "packing": True},
    "lean bf16": {"memory": "lean", "bf16": True},
}
ARMS = (*TRL, *OURS)
ROWS, RANK, RATE = 8, 8, 2e-4
FIGURES = ("seconds", "cpu_seconds", "memory")
NOTES = {"trl bf16": "padding-free, without checkpointing", "balanced": "float32, `loratory train`'s default"}
CLOSE = 0.01  # losses are called equal up to here
WHY = """Why `lean` in float32 takes longer: it recomputes whole blocks, so that a step takes the product with each frozen weight three times
(forward, forward again, gradient of the input) where `fast` takes it twice, and it is held against a time of bf16. Tried: `balanced`,
which recomputes only what is cheap; it keeps the time and saves less.

Where packed rows take longer: attention is taken over the whole packed row under a mask. {padding:.0%} of a padded batch is padding here."""


class Watch(TrainerCallback):
    """Seconds and processor seconds of each step; resident memory at the start."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.start = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        for p in kwargs["model"].parameters():
            p.detach().sum()  # a mapped file comes into memory when it is first read
        Path("/proc/self/clear_refs").write_text("5")  # the highest size counts from here
        self.start = status("VmRSS")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.wall.append(time.perf_counter() - self.began[0])
        self.cpu.append(time.process_time() - self.began[1])


def rows(steps: int) -> list[dict[str, Any]]:
    lines = (ROOT / "data" / "e2e" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: ROWS * steps]]


def encoded_rows(steps: int, tokenizer: Any) -> Any:
    given = rows(steps)
    task = make_task("chat", prompt_column="mr", completion_column="ref", max_length=512).resolve(given)
    return task.encode(given, tokenizer)


def padding(steps: int) -> float:
    """The share of padding in the batches of these steps."""
    encoded = encoded_rows(steps, load_base("smollm2-135m", "AutoModelForCausalLM")[1])
    lengths = [len(encoded[i]["input_ids"]) for i in range(len(encoded))]
    batches = [lengths[i : i + ROWS] for i in range(0, len(lengths), ROWS)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def by_trl(options: dict[str, Any], steps: int, folder: str) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load_base("smollm2-135m", "AutoModelForCausalLM")
    encoded = encoded_rows(steps, tokenizer)
    data = Dataset.from_list(
        [
            {"input_ids": row["input_ids"], "completion_mask": [int(label != -100) for label in row["labels"]]}
            for row in (encoded[i] for i in range(len(encoded)))
        ]
    )
    config = SFTConfig(
        folder, max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=RATE, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=42, max_length=None, weight_decay=0.0, completion_only_loss=True, **options,
    )  # fmt: skip
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def by_us(options: dict[str, Any], steps: int, folder: str) -> Any:
    from loratory.train.arguments import training_arguments
    from loratory.train.run import make_trainer, prepare
    from loratory.train.settings import read_settings

    train = Path(folder) / "train.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows(steps)))
    settings = read_settings(
        {
            "base": "smollm2-135m", "train": str(train), "dev": str(train), "dev_rows": 8, "prompt_column": "mr", "completion_column": "ref",
            "rank": RANK, "alpha": RANK, "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": steps,
            "per_device_train_batch_size": ROWS, "logging_steps": 1, "seed": 42, "max_length": 512, "output_dir": folder,
            "device": "cpu", "eval_steps": 10**6, "save_steps": 10**6, "load_best_model_at_end": False, **options,
        }
    )  # fmt: skip
    run = prepare(settings, lambda text: None)
    arguments = training_arguments(settings, run.device, run.task.best_metric)
    return make_trainer(run, arguments, run.record(), {}, ())


def arm(name: str, steps: int) -> dict[str, Any]:
    """One arm in this process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = by_trl(TRL[name], steps, folder) if name in TRL else by_us(OURS[name], steps, folder)
        watch = Watch()
        trainer.add_callback(watch)
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {
        "seconds": statistics.median(watch.wall[2:]),
        "cpu_seconds": statistics.median(watch.cpu[2:]),
        "memory": status("VmHWM") - watch.start,
        "losses": losses,
    }


def measure(names: list[str], steps: int, rounds: int) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for round_ in range(rounds):
        for name in names if round_ % 2 == 0 else names[::-1]:
            command = [sys.executable, __file__, "--arm", name, "--steps", str(steps)]
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"}
            )
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            last = found[name][-1]
            print(
                f"round {round_ + 1} of {rounds}, {name}: {last['seconds']:.2f} s, {last['memory'] / 2**20:,.0f} MiB",
                flush=True,
            )
    return found


def least(found: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """The arm of TRL with the least of each figure, by the median over rounds."""
    theirs = [name for name in TRL if name in found]
    return {key: min(theirs, key=lambda name: statistics.median(run[key] for run in found[name])) for key in FIGURES}


def table(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each arm: medians over rounds, ratios to TRL's least of the same round, and how far losses are from those arms'."""
    out, theirs = [], least(found)
    losses = {name: statistics.fmean(runs[0]["losses"]) for name, runs in found.items()}
    for name, runs in found.items():
        row: dict[str, Any] = {"arm": name}
        row |= {key: statistics.median(run[key] for run in runs) for key in FIGURES}
        for key, other in theirs.items():
            ratios = [own[key] / their[key] for own, their in zip(runs, found[other], strict=True)]
            row |= {f"{key}_ratio": statistics.median(ratios), f"{key}_arm": other}
            row[f"{key}_loss_gap"] = losses[name] / losses[other] - 1
        out.append(row | {"loss": losses[name]})
    return out


def percent(gap: float) -> str:
    """A loss gap, in bold where the losses are not equal."""
    return f"**{gap:+.1%}**" if abs(gap) > CLOSE else f"{gap:+.1%}"


def gaps(line: dict[str, Any], *figures: str) -> dict[str, float]:
    """How far the loss is from that of the arms these figures are compared with."""
    return {line[f"{key}_arm"]: line[f"{key}_loss_gap"] for key in figures}


def shown(lines: list[dict[str, Any]]) -> str:
    heads = ["arm", "step (s)", "processor (s)", "memory (MiB)", "time / TRL's least", "processor / TRL's least"]
    heads += ["memory / TRL's least", "loss", *(f"loss off that of {name}" for name in gaps(lines[0], *FIGURES))]
    body = [
        f"| {x['arm']} | {x['seconds']:.2f} | {x['cpu_seconds']:.2f} | {x['memory'] / 2**20:,.0f} | {x['seconds_ratio']:.2f} | "
        f"{x['cpu_seconds_ratio']:.2f} | {x['memory_ratio']:.2f} | {x['loss']:.4f} | "
        f"{' | '.join(map(percent, gaps(x, *FIGURES).values()))} |"
        for x in lines
    ]
    return "\n".join([*head(heads), *body])


def verdict(aims: dict[str, float], line: dict[str, Any]) -> str:
    """Whether ratios are within their aims; never where the losses are unequal."""
    gap = max(gaps(line, *aims).values(), key=abs)
    ratios = {key: line[f"{key}_ratio"] for key in aims}
    met = abs(gap) <= CLOSE and all(ratios[key] <= aim for key, aim in aims.items())
    text = f"{'met' if met else 'missed'}, {' at '.join(f'{ratio:.2f}' for ratio in ratios.values())}"
    return text if abs(gap) <= CLOSE else f"{text}, its loss off by {percent(gap)}"


def verdicts(lines: list[dict[str, Any]]) -> str:
    """What the columns mean, the aims, and what came."""
    said = [
        "Each ratio is to the least of that figure among TRL's arms that were measured. bf16 is autocast, TRL's default. `trl best` is float32, "
        f"padding-free, without checkpointing. Losses are to be equal within {CLOSE:.0%}; where they are not the gap is in bold, and the ratios "
        "of that row are not at equal loss."
    ]
    fast = [x for x in lines if x["arm"].startswith("fast")]
    if fast:
        best = min(fast, key=lambda x: (abs(x["seconds_loss_gap"]) > CLOSE, x["seconds_ratio"]))
        said.append(f"`fast` at most 0.55 of TRL's least time: {verdict({'seconds': 0.55}, best)} ({best['arm']}).")
    for x in lines:
        if x["arm"].startswith("lean"):
            came = verdict({"memory": 0.5, "seconds": 1.0}, x)
            said.append(f"`{x['arm']}` at most half of TRL's least memory at no more than its least time: {came}.")
    return " ".join(said)


def absent(lines: list[dict[str, Any]]) -> str:
    """The arms that a run left out, in one sentence."""
    measured = {x["arm"] for x in lines}
    names = [f"`{name}`" + (f" ({NOTES[name]})" if name in NOTES else "") for name in ARMS if name not in measured]
    return f"Not measured in this run: {', '.join(names)}.\n\n" if names else ""


def text(record: dict[str, Any]) -> str:
    lines = record["arms"]
    return (
        f"# The everyday job, beside TRL\n\n{told(record)}. Load of the machine over the last quarter of an hour: {record['load']:.1f}.\n\n"
        f"{shown(lines)}\n\n{verdicts(lines)}\n\n{absent(lines)}{WHY.format(padding=record['padding'])}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--tables", action="store_true", help="only write the tables again from the JSON of a run")
    a = parser.parse_args()
    if a.arm:
        print(json.dumps(arm(a.arm, a.steps)))
        return
    if not set(a.arms) & set(TRL):
        parser.error("--arms: at least one of TRL's, which the others are compared with: " + ", ".join(TRL))
    if a.tables:
        record = read(a.out, "job")
        record["arms"] = table(record["runs"])
        write(a.out, "job", record, text(record))
        return
    found = measure(a.arms, a.steps, a.rounds)
    lines = table(found)
    command = f"python benchmarks/job.py --steps {a.steps} --rounds {a.rounds}"
    if a.arms != list(ARMS):
        command += " --arms " + " ".join(shlex.quote(name) for name in a.arms)
    record = about(command, "transformers", "peft", "trl") | {
        "load": os.getloadavg()[2],
        "padding": padding(a.steps),
        "arms": lines,
        "runs": found,
    }
    write(a.out, "job", record, text(record))
    print(shown(lines))


if __name__ == "__main__":
    main()
