"""What `loratory plan` predicts, beside what comes: live tensor bytes and the process's peak of real training steps on a CPU.

    python benchmarks/plan.py                     # the twelve cases of plan_cases.json, each alone in fresh processes
    python benchmarks/plan.py llama-lora-float32  # some of them

Live bytes are what torch's CPU allocator reports to torch.profiler, base included, at their peak over three steps. The process's
peak is VmHWM over VmRSS before the model is made. Weights are random: memory does not depend on them. Writes results/plan.json
and results/plan.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
CASES = json.loads((HERE / "plan_cases.json").read_text())
STEPS = 3
CONSTANT = (
    96 * 2**20
)  # bytes that a process needs for its first step beside tensors: code, threads, the allocator's own


def settings_of(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Settings of `loratory train`, with the case's base as a folder that holds a config."""
    config = CASES["bases"][case["base"]]
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return {**{k: v for k, v in case.items() if k not in ("name", "base")}, "base": folder}


def make(case: dict[str, Any], folder: str) -> tuple[Any, Any, dict[str, Any]]:
    """A real model with its adapter, its optimizer, and a batch."""
    import transformers

    import loratory as lt
    from loratory.tasks import make_task
    from loratory.train.base import DTYPES
    from loratory.train.planned import inputs_of, planned_settings, read_config
    from loratory.train.run import adapt, silent

    settings = planned_settings(settings_of(case, folder), {})
    task, config = make_task(settings.task, **settings.task_options), read_config(settings)
    torch.manual_seed(0)
    model = getattr(transformers, task.auto_class).from_config(config, dtype=DTYPES[settings.dtype])
    if settings.quantize:
        lt.quantize(model, settings.quantize)
    adapt(model, settings, task, 1, silent)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    shapes = inputs_of(settings, config, task)(settings.per_device_train_batch_size)
    batch = {
        name: torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(1, 2, shape)
        for name, (shape, dtype) in shapes.items()
    }
    if "input_ids" in batch:
        batch["attention_mask"][:, -1] = 0  # rows are padded, as in most batches
    optimizer = torch.optim.AdamW(lt.param_groups(model, lr=1e-4), fused=True)
    return model.train(), optimizer, batch


def step(model: Any, optimizer: Any, batch: dict[str, Any]) -> None:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def live(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Bytes of live tensors at their peak, by the allocator's own account."""
    from torch.profiler import ProfilerActivity, profile

    model, optimizer, batch = make(case, folder)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(STEPS):
            step(model, optimizer, batch)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = sum(storages.values()) + sum(t.untyped_storage().nbytes() for t in batch.values())
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return {"live": most}


def process(case: dict[str, Any], folder: str) -> dict[str, Any]:
    """The process's peak over what it was before there was a model, and the seconds of a step."""
    load_code(case, folder)
    bare = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model, optimizer, batch = make(case, folder)
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step(model, optimizer, batch)
        seconds.append(time.perf_counter() - began)
    return {"process": status("VmHWM") - bare, "seconds": min(seconds)}


def load_code(case: dict[str, Any], folder: str) -> None:
    """Import what the case needs, the model's own file included."""
    import transformers

    import loratory.train.run  # noqa: F401
    from loratory.tasks import make_task
    from loratory.train.planned import planned_settings, read_config

    settings = planned_settings(settings_of(case, folder), {})
    with torch.device("meta"):
        getattr(transformers, make_task(settings.task).auto_class).from_config(read_config(settings))


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def predicted(case: dict[str, Any], folder: str) -> dict[str, Any]:
    import loratory as lt

    plan = lt.plan(settings_of(case, folder))
    return {"peak": plan.peak, "startup": plan.startup_peak, "parts": plan.parts}


def alone(kind: str, case: dict[str, Any]) -> dict[str, Any]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--measure", kind, case["name"]]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    if out.returncode:
        raise RuntimeError(f"{case['name']}: measuring {kind} failed:\n{out.stderr}")
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="names; default: all")
    parser.add_argument("--measure", choices=("live", "process", "predicted"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    chosen = [case for case in CASES["cases"] if not given.cases or case["name"] in given.cases]
    if given.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(
                json.dumps({"live": live, "process": process, "predicted": predicted}[given.measure](chosen[0], folder))
            )
        return
    for case in chosen:
        found = alone("predicted", case) | alone("live", case) | alone("process", case)
        print(
            case["name"],
            f"peak {found['peak'] / 2**20:.1f} live {found['live'] / 2**20:.1f} ({found['peak'] / found['live'] - 1:+.1%})  process {found['process'] / 2**20:.1f} ({found['process'] - found['peak'] >> 20} MiB more, {found['process'] / max(found['peak'], found['startup']) - 1:+.1%}) {found['seconds']:.2f}s",
            flush=True,
        )


if __name__ == "__main__":
    main()
