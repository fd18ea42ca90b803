"""What `loratory plan` predicts, beside what comes: live tensor bytes and the process's peak of real training steps on a CPU.

    python benchmarks/plan.py                     # the twelve cases of plan_cases.json, each alone in fresh processes
    python benchmarks/plan.py llama-lora-float32  # some of them

Live bytes are what torch's CPU allocator reports to torch.profiler, base included, at their peak over three steps. The process's
peak is VmHWM over VmRSS before the model is made, in a process that has imported what it needs, and in which glibc gives freed
blocks back (MALLOC_MMAP_THRESHOLD_); the peak with glibc's defaults stands beside it. Weights are random: memory does not depend
on them. Writes results/plan.json and results/plan.md. Linux; about 8 minutes.
"""

import argparse
import json
import os
import platform
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
BOUNDS = CASES["bounds"]
CONSTANT = 32 * 2**20  # bytes that a process needs for its first steps beside tensors: code, libraries' work space
MAPPED = 128 << 10  # glibc maps blocks from this size on, so that freeing gives them back
RESULTS = HERE / "results"


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
    """What the plan says."""
    import loratory as lt

    plan = lt.plan(settings_of(case, folder), calibrate=True)
    return {
        "predicted": plan.peak,
        "startup": plan.startup_peak,
        "parts": plan.parts,
        "predicted_seconds": plan.step_seconds,
    }


def alone(kind: str, case: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--measure", kind, case["name"]]
    out = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    if out.returncode:
        raise RuntimeError(f"{case['name']}: measuring {kind} failed:\n{out.stderr}")
    return json.loads(out.stdout.splitlines()[-1])


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """All figures of a case."""
    found = {"case": case["name"]} | alone("predicted", case) | alone("live", case)
    found |= alone("process", case, MALLOC_MMAP_THRESHOLD_=str(MAPPED))
    usual = alone("process", case)
    found |= {"process_default": usual["process"], "seconds": usual["seconds"]}
    most = max(found["predicted"], found["startup"])
    found["live_error"] = found["predicted"] / found["live"] - 1
    found["process_error"] = (most + CONSTANT) / found["process"] - 1
    found["holds"] = (
        abs(found["live_error"]) <= BOUNDS["live"]
        and abs(found["process"] - CONSTANT - most) <= BOUNDS["process"] * most
    )
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | predicted | live | off | process | off | default malloc | step predicted | came | holds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        mib = {key: f"{row[key] / 2**20:,.0f}" for key in ("predicted", "live", "process", "process_default")}
        lines.append(
            f"| {row['case']} | {mib['predicted']} | {mib['live']} | {row['live_error']:+.1%} | {mib['process']} | {row['process_error']:+.1%} "
            f"| {mib['process_default']} | {row['predicted_seconds']:.2f} s | {row['seconds']:.2f} s | {'yes' if row['holds'] else 'no'} |"
        )
    return "\n".join(lines)


def about() -> dict[str, Any]:
    """Where and with what this was measured."""
    import transformers

    import loratory as lt

    model = next(
        (
            line.split(": ")[1]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "command": "python benchmarks/plan.py", "date": time.strftime("%Y-%m-%d"), "cpu": model, "threads": 1, "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__, "loratory": lt.__version__, "libc": " ".join(platform.libc_ver()),
        "bounds": BOUNDS, "constant": CONSTANT, "mapped_from": MAPPED, "steps": STEPS,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="names; default: all, and the results are written")
    parser.add_argument("--measure", choices=("live", "process", "predicted"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    chosen = [case for case in CASES["cases"] if not given.cases or case["name"] in given.cases]
    if given.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(
                json.dumps({"live": live, "process": process, "predicted": predicted}[given.measure](chosen[0], folder))
            )
        return
    rows = []
    for case in chosen:
        rows.append(measure(case))
        print(table(rows).splitlines()[-1], flush=True)
    if given.cases:
        return
    from loratory.store.atomic import write_files

    facts = about()
    RESULTS.mkdir(exist_ok=True)
    text = f"""# What a plan predicts, and what comes

Sizes in MiB. `live` is torch's own account of its CPU allocator, `process` VmHWM over VmRSS before the model is made, where glibc gives freed blocks of
{MAPPED >> 10} KiB and more back (MALLOC_MMAP_THRESHOLD_={MAPPED}); off: predicted, plus a constant of {CONSTANT >> 20} MiB for the process, against measured. With glibc's
defaults the holes that freed tensors leave come on top (`default malloc`), and differ from run to run. A step's time came in those runs, the fastest of {STEPS}.
{sum(row["holds"] for row in rows)} of {len(rows)} cases are within {BOUNDS["live"]:.0%} (live) and {BOUNDS["process"]:.0%} plus the constant (process).

{table(rows)}

{facts["command"]}, {facts["date"]}: {facts["cpu"]}, {facts["threads"]} thread, Python {facts["python"]}, torch {facts["torch"]}, transformers {facts["transformers"]}, {facts["libc"]}.
"""
    write_files(
        RESULTS,
        {"plan.json": json.dumps({"about": facts, "rows": rows}, indent=1).encode() + b"\n", "plan.md": text.encode()},
    )
    print(f"\n{sum(row['holds'] for row in rows)} of {len(rows)} hold; written to {RESULTS}")


if __name__ == "__main__":
    main()
