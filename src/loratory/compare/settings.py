"""What a comparison is asked to do: one dataclass from which flags, YAML keys and help are made."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import loratory
from loratory.compare.arms import Arm, read_arms
from loratory.compare.budget import Budget, read_budget
from loratory.train.settings import canonical, convert, read_settings

PRESETS = Path(__file__).parent / "presets"
OURS = {  # settings of a training run that a comparison sets itself -> what to use instead
    "method": "methods",
    "learning_rate": "rates",
    "seed": "seeds",
    "output_dir": "out",
    "overwrite": "another out",
    "resume": "the same command again: it goes on by itself",
    "dry_run": "`loratory train --dry_run`",
    "max_minutes": "budget seconds=N",
    "measure_test": "nothing: the chosen rates alone are measured on test, once",
    "eval_before": "the method frozen among the methods",
}


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Compare methods on one task: the same rows, seeds and budget, a learning rate chosen for each on dev, test used once."""

    out: str = "comparison"  # folder for results, runs and the report
    preset: str | None = None  # start from a ready comparison: `loratory compare --help` lists them
    name: str | None = None  # title; default: the preset's name, or the task
    methods: Any = ()  # lora,dora,'lora rank=16',peft:vera,full,head-only,frozen; in YAML also {label: settings}
    baseline: str | None = None  # what the others are held against; default: the first method
    seeds: Any = 3  # how many, or which: 0,1,2
    search_seeds: int | None = None  # learning rates are tried on the first so many seeds; default: on all
    rates: list[float] | None = None  # learning rates tried for each method; default: by what a method trains
    extend_grid: bool = False  # where the best rate is at the edge of its grid, try rates beyond it
    budget: str | None = None  # the same for all: steps=N, trained=N, memory=2GB, adapter_bytes=2MB or seconds=N
    metric: str | None = None  # what is reported on test; default: the task's own
    engine: Literal["local", "ray"] = "local"  # ray: runs go to a Ray cluster (pip install 'loratory[ray]')
    address: str | None = None  # of a running Ray cluster; default: RAY_ADDRESS, else one on this machine
    pool: int | None = None  # runs at once; default: one for each 8 cores
    threads: int | None = None  # of each run; default: the cores, shared among the runs at once
    retries: int = 1  # how often a failed or killed run is tried again
    shared: dict[str, Any] = field(default_factory=dict)  # the training settings that all runs share

    def __post_init__(self) -> None:
        for name in ("search_seeds", "pool", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or left out")
        self.limit()  # a budget that cannot be read is told before anything runs
        if self.retries < 0:
            raise ValueError(f"retries is {self.retries}; it must be at least 0")
        if self.search_seeds is not None and self.search_seeds > len(self.all_seeds()):
            raise ValueError(
                f"search_seeds is {self.search_seeds}, but there are {len(self.all_seeds())} seeds; lower it, or leave it out"
            )
        self.limit()
        labels = [arm.label for arm in self.arms()]
        if self.baseline is not None and self.baseline not in labels:
            raise ValueError(
                f"baseline is '{self.baseline}', which is not among the methods ({', '.join(labels)}); add it"
            )

    def arms(self) -> tuple[Arm, ...]:
        return read_arms(self.methods, self.rates)

    def all_seeds(self) -> list[int]:
        """The seeds in their order. Raises ValueError for none, or one given twice."""
        found = list(range(self.seeds)) if isinstance(self.seeds, int) else [int(seed) for seed in self.seeds]
        if not found or len(set(found)) < len(found):
            raise ValueError(
                f"seeds is {self.seeds!r}; it must be a count of at least 1, or a list of different numbers"
            )
        return found

    def limit(self) -> Budget | None:
        return read_budget(self.budget)


OWN = tuple(f.name for f in fields(CompareSettings) if f.name != "shared")


def presets() -> dict[str, Path]:
    """Names of the ready comparisons, with their files."""
    return {file.stem: file for file in sorted(PRESETS.glob("*.yaml"))}


def read_compare(given: Mapping[str, Any]) -> CompareSettings:
    """Settings from flat keys: those of CompareSettings, and training settings that all runs share.

    A preset's keys stand beneath the given ones. Raises ValueError for an unknown key or preset, or a setting that a comparison
    sets itself, saying what to use instead.
    """
    flat = {str(key).replace("-", "_"): value for key, value in given.items()}
    if flat.get("preset") is not None:
        flat = read_preset(str(flat["preset"])) | flat
    own = {key: flat.pop(key) for key in list(flat) if key in OWN}
    shared = canonical(flat)
    for key in shared:
        if key in OURS:
            raise ValueError(f"'{key}' cannot be set, a comparison sets it for each run; use {OURS[key]}")
    if isinstance(own.get("seeds"), str):
        parts = [part for part in own["seeds"].split(",") if part.strip()]
        try:
            own["seeds"] = int(parts[0]) if len(parts) == 1 else [int(part) for part in parts]
        except ValueError:
            raise ValueError(
                f"seeds is {own['seeds']!r}; it must be a count, or whole numbers with commas: 0,1,2"
            ) from None
    hints = typing.get_type_hints(CompareSettings)
    typed = convert({key: value for key, value in own.items() if hints[key] is not Any}, hints)
    settings = CompareSettings(**(own | typed), shared=shared)
    for arm in settings.arms():  # unknown keys and wrong values are told before anything runs
        read_settings(run_keys(settings, arm))
    return settings


def run_keys(settings: CompareSettings, arm: Arm) -> dict[str, Any]:
    """The training settings of an arm, without seed, rate and folder."""
    return (
        {"measure_test": False, "eval_before": False, "load_best_model_at_end": False} | settings.shared | arm.settings
    )


def read_preset(name: str) -> dict[str, Any]:
    """The keys of a ready comparison; its data files are found beside the source."""
    import yaml

    known = presets()
    if name not in known:
        raise ValueError(f"there is no preset '{name}'; there are: {', '.join(known)}")
    keys: dict[str, Any] = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    for split in ("train", "dev", "test"):
        keys[split] = str(find_data(keys[split], name))
    return keys


def find_data(file: str, preset: str) -> Path:
    """A preset's file, in the working folder or the source checkout. Raises FileNotFoundError saying where it was looked for."""
    places = [Path.cwd(), Path(loratory.__file__).resolve().parents[2]]
    for place in places:
        if (place / file).is_file():
            return place / file
    looked = " and ".join(str(place) for place in dict.fromkeys(places))
    raise FileNotFoundError(
        f"preset '{preset}' reads {file}, which is not in {looked}; it lies in loratory's source checkout and is not part of the "
        "installed package: run there, or name your own files with --train, --dev and --test"
    )
