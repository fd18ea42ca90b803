"""`compare`: runs what a comparison needs, keeps what is finished, and goes on where an earlier call stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from loratory.compare.arms import Arm
from loratory.compare.budget import NotTimed
from loratory.compare.choice import NO_RATE, Step, choose, count_left, edge_warning, extend, key_of, steps
from loratory.compare.definition import LABELS, define
from loratory.compare.jobs import JOB, Answer, Job, Pool
from loratory.compare.local_pool import LocalPool
from loratory.compare.outcome import Comparison, Run
from loratory.compare.results import FILE, Results
from loratory.compare.settings import CompareSettings, read_compare, run_keys
from loratory.train.folder import write_text

Say = Callable[[str], None]
RECIPE = "compare.yaml"


def compare(settings: CompareSettings | None = None, *, say: Say = print, **keys: Any) -> list[dict[str, Any]]:
    """Compare methods fairly, and get one row for each run: `pandas.DataFrame(lt.compare(...))`.

    Keys are those of `loratory compare` (methods, seeds, rates, budget, out, ...) and training settings that all runs share
    (base, task, train, dev, test, max_steps, ...). Results stay in `out`: the same call goes on where an earlier one stopped.
    Raises ValueError for settings that cannot be, a budget that no method meets, rows or settings that changed since, a results
    file of another schema; KeyboardInterrupt on Ctrl-C, with everything finished kept.
    """
    if (settings is None) == (not keys):
        raise TypeError(
            "compare takes either one CompareSettings object or settings as keywords, not both and not neither"
        )
    return rows(run_comparison(settings or read_compare(keys), say=say))


def run_comparison(settings: CompareSettings, *, say: Say = print, command: str = "") -> Comparison:
    """Do what is missing, write the report, and return all of it."""
    folder = Path(settings.out).resolve()
    if folder.is_file():
        raise FileExistsError(f"out '{settings.out}' is a file; name a folder")
    if (
        folder.is_dir()
        and not (folder / FILE).exists()
        and any(not path.name.startswith(".") for path in folder.iterdir())
    ):
        raise FileExistsError(f"out '{settings.out}' holds other things than a comparison; name another folder")
    pool = make_pool(settings)
    try:
        with alone(folder):
            results = Results(folder)
            work = Work(folder, settings, results, pool, say)
            work.definition = define(settings, results, timed=work.seconds_of_a_step, say=say, command=command)
            write_recipe(folder, settings)
            work.run()
    except KeyboardInterrupt:
        say("Ctrl-C: saving what runs; what is finished is kept")
        pool.stop()
        say(f"go on with: {how_to_go_on(folder)}")
        raise
    finally:
        pool.close()
    return finish(folder, say)


def finish(folder: Path, say: Say) -> Comparison:
    """The report, from what the results file holds."""
    from loratory.compare.report import write_report

    comparison = read_comparison(folder)
    for warning in comparison.warnings:
        say(f"note: {warning}")
    say(f"report: {write_report(comparison, folder)}")
    return comparison


def make_pool(settings: CompareSettings) -> Pool:
    """Where the runs go."""
    cores = os.cpu_count() or 1
    if settings.engine == "ray":
        from loratory.compare.ray_pool import RayPool

        return RayPool(settings.threads or max(1, min(cores, 8)), settings.pool, settings.address)
    size = settings.pool or max(1, cores // 8)
    return LocalPool(size, settings.threads or max(1, cores // size))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While this comparison is worked on by no other process. Raises RuntimeError if it is."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"another process works on '{folder}'; wait for it, or name another out") from None
        yield


def write_recipe(folder: Path, settings: CompareSettings) -> None:
    """The settings as a YAML file that starts the same comparison."""
    import yaml

    own = {
        key: value for key, value in asdict(settings).items() if key not in ("shared", "preset") and value is not None
    }
    own["methods"] = {arm.label: {**arm.settings, "rates": list(arm.rates)} for arm in settings.arms()}
    keys = json.loads(
        json.dumps({**own, "name": settings.name or settings.preset, "out": str(folder), **settings.shared})
    )
    write_text(folder / RECIPE, yaml.safe_dump({k: v for k, v in keys.items() if v is not None}, sort_keys=False))


def how_to_go_on(folder: Path) -> str:
    return f"loratory compare --config {shlex.quote(str(folder / RECIPE))}"


class Work:
    """The runs of one call: what is there, what runs, what was given up."""

    def __init__(self, folder: Path, settings: CompareSettings, results: Results, pool: Pool, say: Say) -> None:
        self.folder, self.settings, self.results, self.pool, self.say = folder, settings, results, pool, say
        self.definition: dict[str, Any] = {}
        self.runs, self.tests = results.runs(), results.tests()
        self.attempts: dict[str, int] = {}
        self.given_up: set[str] = set()
        self.began: dict[str, float] = {}
        self.took: dict[tuple[str, str], list[float]] = {}  # (kind, label) -> seconds of each that ended
        self.finished = 0

    def run(self) -> None:
        """Until nothing is left to do."""
        self.total = sum(map(sum, self.left().values()))
        if self.total:
            self.say(f"{self.total} to do, {self.pool.size} at a time; Ctrl-C keeps everything finished")
        waiting: dict[str, Step] = {}
        while True:
            if self.settings.extend_grid and (said := extend(self.definition, self.runs)):
                self.results.define(self.definition)
                for line in said:
                    self.say(line)
                self.total = self.finished + sum(map(sum, self.left().values()))
            for step in steps(self.definition, self.runs, self.tests, self.given_up):
                job = self.job(step)
                if job.key in waiting or self.pool.running() >= self.pool.size:
                    continue
                if (answer := self.left_behind(job)) is not None:
                    self.take(step, job, answer)
                    break  # what can be done next may have changed
                waiting[job.key] = step
                self.begin(job, step)
            else:
                if not self.pool.running():
                    return
                job, answer = self.pool.next()
                self.take(waiting.pop(job.key), job, answer)

    def begin(self, job: Job, step: Step) -> None:
        self.began[job.key] = time.monotonic()
        self.attempts[job.key] = self.attempts.get(job.key, 0) + 1
        self.say(f"started   {job.title}" + (" (again)" if self.attempts[job.key] > 1 else ""))
        self.pool.start(job)

    def take(self, step: Step, job: Job, answer: Answer) -> None:
        """Keep what a job came to, and say it."""
        if answer["status"] == "interrupted":
            raise KeyboardInterrupt
        if job.key in self.began:
            self.took.setdefault((step.kind, step.label), []).append(time.monotonic() - self.began[job.key])
        lost = answer["status"] in ("failed", "killed")
        if lost and self.attempts.get(job.key, 0) > self.settings.retries:
            self.given_up.add(job.key)
        if step.kind == "train":
            body = {
                **answer,
                "method": step.label,
                "settings": job.settings,
                "seed": step.seed,
                "learning_rate": step.rate,
            }
            self.results.add_run(step.key, body)
            self.runs[step.key] = body
        elif not lost:
            self.results.add_test(step.key, answer)
            self.tests[step.key] = answer
        again = lost and job.key not in self.given_up
        self.finished += not again
        self.say(
            f"{self.number()} {job.title}: {self.words(step, answer)}{', tried again' if again else ''}; {self.time_left()}"
        )

    def words(self, step: Step, answer: Answer) -> str:
        if answer["status"] != "done":
            return f"{answer['status']}: {answer['error']}"
        name = self.definition["dev_metric"] if step.kind == "train" else self.definition["metric"]
        score = answer["dev" if step.kind == "train" else "test"].get(name)
        shown = "no score" if score is None else f"{name} {score:.4f}"
        seconds = f", {answer['seconds']:.0f} s" if step.kind == "train" else ""
        return f"{shown} on {'dev' if step.kind == 'train' else 'test'}{seconds}"

    def number(self) -> str:
        return f"[{self.finished}/{self.total}]"

    def left(self) -> dict[str, tuple[int, int]]:
        return count_left(self.definition, self.runs, self.tests, self.given_up)

    def time_left(self) -> str:
        """From how long each method's runs took; others count as the mean of all."""
        from loratory.train.callbacks import clock

        if not self.took:
            return "time left not known yet"

        def usual(kind: str, label: str) -> float:
            own = self.took.get((kind, label))
            return fmean(own or [t for (k, _), each in self.took.items() if k == kind for t in each] or [0.0])

        left = self.left()
        seconds = sum(n * usual("train", label) + m * usual("test", label) for label, (n, m) in left.items())
        more = (
            " and the measurements"
            if not any(kind == "test" for kind, _ in self.took) and any(m for _, m in left.values())
            else ""
        )
        return f"about {clock(seconds / self.pool.size)} left{more}"

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def job(self, step: Step) -> Job:
        """What a worker is told to do a step."""
        arm = self.definition["arms"][step.label]
        rate = {"learning_rate": step.rate} if step.rate != NO_RATE else {}
        folder = place_of(self.folder / "runs", step.key)
        given = run_keys(self.settings, Arm(label=step.label, settings=arm["settings"], rates=())) | arm["changes"]
        settings = given | rate | {"seed": step.seed, "output_dir": str(folder / "run")}
        title = step.key.replace(" | ", ", ") + (", on test" if step.kind == "test" else "")
        return Job(
            kind=step.kind,
            key=step.key if step.kind == "train" else f"test {step.key}",
            title=title,
            folder=str(folder),
            settings=absolute(json.loads(json.dumps(settings))),
            fingerprint=self.definition["fingerprint"],
            metric=self.definition["metric"] if step.kind == "test" else self.definition["dev_metric"],
        )

    def left_behind(self, job: Job) -> Answer | None:
        """What the job found when it ended without anybody to take it (the comparison was killed meanwhile)."""
        told = Path(job.folder) / f"{job.kind}-job.json"
        if job.key in self.attempts or not (job.answer.is_file() and told.is_file()):
            return None
        if json.loads(told.read_text(encoding="utf-8")) != asdict(job):
            return None
        answer: Answer = json.loads(job.answer.read_text(encoding="utf-8"))
        return answer if answer["status"] == "done" else None

    def seconds_of_a_step(self, arm: Arm, keys: dict[str, Any], fingerprint: str) -> float:
        """Measured on a few steps of the arm, in a process of its own. Raises NotTimed where that fails, again and again."""
        folder = place_of(self.folder / "runs", f"{arm.label} | timed")
        rate = arm.rates[len(arm.rates) // 2]
        settings = keys | {"learning_rate": rate, "seed": 0, "output_dir": str(folder / "run")}
        title = f"{arm.label}, timed"
        job = Job(
            kind="time", key=title, title=title, folder=str(folder), settings=absolute(json.loads(json.dumps(settings))),
            fingerprint=fingerprint, metric="",
        )  # fmt: skip
        for _ in range(1 + self.settings.retries):
            self.pool.start(job)
            _, answer = self.pool.next()
            if answer["status"] == "interrupted":
                raise KeyboardInterrupt
            if answer["status"] == "done":
                return float(answer["step_seconds"])
            if answer["status"] == "diverged":
                break
        raise NotTimed(arm, answer["error"])


def absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """The same with whole paths: a worker may run in another folder."""
    places = {key: settings.get(key) for key in ("train", "dev", "test", "base")}
    return settings | {
        key: str(Path(place).resolve()) for key, place in places.items() if place and os.path.exists(place)
    }


def place_of(runs: Path, key: str) -> Path:
    """The folder of a run, its own: words of the key for people, and a digest, since `lora` and `lora+` have the same words.

    Folders used to have no digest: one that holds this very run is taken up.
    """
    words = re.sub(r"[^A-Za-z0-9.=_]+", "-", key).strip("-")
    old, told = runs / words[:255], runs / words[:255] / f"train-{JOB}"
    if told.is_file() and json.loads(told.read_text(encoding="utf-8"))["key"] == key:
        return old
    return runs / f"{words[:100]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


# -- what came of it ---------------------------------------------------------------------------------------------------


def read_comparison(folder: str | Path) -> Comparison:
    """A comparison from its results file alone. Raises FileNotFoundError without one, ValueError for another schema."""
    results = Results(folder, new=False)
    definition = results.definition()
    if definition is None:
        raise ValueError(
            f"'{folder}' holds a comparison without any run; start it again with the command that began it"
        )
    runs, tests = results.runs(), results.tests()
    chosen = {label: rate for label in definition["arms"] if (rate := choose(definition, label, runs)) is not None}
    label, scale = LABELS.get(definition["metric"], (definition["metric"], 1.0))
    found = []
    for method, arm in definition["arms"].items():
        for rate in arm["rates"] or [NO_RATE]:
            for seed in definition["seeds"]:
                key = key_of(method, rate, seed)
                if key in runs:
                    found.append(one_run(runs[key], tests.get(key) if chosen.get(method) == rate else None))
    budget = {"kind": None, "amount": None} if not definition["budget"] else dict(
        zip(("kind", "amount"), definition["budget"].split("="), strict=True)
    )  # fmt: skip
    used = {
        method: {"used": arm["used"], "note": arm["note"]} for method, arm in definition["arms"].items() if arm["note"]
    }
    return Comparison(
        name=definition["name"],
        task=definition["task"],
        base=definition["base"],
        metric=definition["metric"],
        metric_label=label,
        metric_scale=scale,
        greater_is_better=bool(definition["greater_is_better"]),
        budget={
            "kind": budget["kind"],
            "amount": float(budget["amount"]) if budget["amount"] else None,
            "methods": used,
        },
        baseline=definition["baseline"],
        methods=list(definition["arms"]),
        seeds=definition["seeds"],
        rates={method: arm["rates"] for method, arm in definition["arms"].items()},
        chosen=chosen,
        runs=found,
        rows=definition["rows"],
        test_texts=results.texts(),
        fingerprint=definition["fingerprint"],
        warnings=warnings(definition, runs, tests, chosen),
        created=definition["created"],
        machine=definition["machine"],
        command=definition["command"],
    )


def one_run(body: Mapping[str, Any], test: Mapping[str, Any] | None) -> Run:
    test = test if test and test["status"] == "done" else None
    points = {
        name: [(int(step), float(value)) for step, value in body.get(name, ())] for name in ("loss_curve", "dev_curve")
    }
    return Run(
        method=body["method"],
        settings=body["settings"],
        seed=body["seed"],
        learning_rate=body["learning_rate"],
        status=body["status"],
        error=body["error"],
        trained=body.get("trained", 0),
        total=body.get("total", 0),
        adapter_bytes=body.get("adapter_bytes"),
        peak_memory=body.get("peak_memory"),
        seconds=body.get("seconds"),
        steps=body.get("steps"),
        dev=body.get("dev", {}),
        test=test["test"] if test else None,
        test_each=test["test_each"] if test else None,
        versions=body.get("versions", {}),
        **points,
    )


def warnings(
    definition: Mapping[str, Any], runs: Mapping[str, Any], tests: Mapping[str, Any], chosen: Mapping[str, float]
) -> list[str]:
    """What a reader must know: left out methods, lost runs, best rates at the edge of their grid."""
    found = [f"left out: {why}" for why in definition["refused"].values()]
    if definition["metric"] != definition["dev_metric"]:
        found.append(f"learning rates were chosen by {definition['dev_metric']} on dev, not by {definition['metric']}")
    for label in definition["arms"]:
        if label not in chosen:
            found.append(f"no learning rate of {label} finished on all search seeds, so it has no result")
    arms = definition["arms"]
    edges = {label: (arm["rates"], chosen[label]) for label, arm in arms.items() if label in chosen and arm["rates"]}
    if edge := edge_warning(edges):
        found.append(edge)
    for key, run in runs.items():
        if run["status"] in ("failed", "killed") and run["method"] in arms:
            found.append(f"{key.replace(' | ', ', ')} {run['status']}: {run['error']}")
    wanted = [key_of(label, rate, seed) for label, rate in chosen.items() for seed in definition["seeds"]]
    found += [
        f"{key.replace(' | ', ', ')} {tests[key]['status']} on test: {tests[key]['error']}"
        for key in wanted
        if key in tests and tests[key]["status"] != "done"
    ]
    missing = [key for key in wanted if key not in tests]
    if missing:
        found.append(
            f"{len(missing)} of the chosen runs are not measured on test (first: {missing[0].replace(' | ', ', ')})"
        )
    return found


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat row for each run, for a dataframe."""
    flat = []
    for run in comparison.runs:
        row = {name: getattr(run, name) for name in ("method", "learning_rate", "seed", "status", "error")}
        row["chosen"] = comparison.chosen.get(run.method) == run.learning_rate
        for name in ("trained", "total", "adapter_bytes", "peak_memory", "seconds", "steps"):
            row[name] = getattr(run, name)
        row |= {f"dev_{name}": value for name, value in run.dev.items()}
        row |= {f"test_{name}": value for name, value in (run.test or {}).items()}
        flat.append(row)
    return flat
