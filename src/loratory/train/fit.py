"""`fit`: the reverse question. Which methods and settings stay within a card or size?"""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from loratory.methods.registry import method_class, registered
from loratory.plan.cards import budget, shown
from loratory.plan.depth import plan_deep
from loratory.plan.job import Sharding
from loratory.sites.packed import QUANTISERS
from loratory.train.planned import NO_DATA, job_of, planned_settings, rates_of, read_config
from loratory.train.settings import TrainSettings, option_names, read_settings

Say = Callable[[str], None]


@dataclass(frozen=True)
class Fit:
    """A method and settings that stay within a budget."""

    method: str
    changes: dict[str, Any]  # settings that differ from those asked for
    peak: int  # bytes, the larger of start-up and step
    trained: int  # numbers
    adapter_bytes: int
    step_seconds: float | None
    command: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fit(
    settings: TrainSettings | Mapping[str, Any],
    card_or_bytes: str | int,
    *,
    methods: Iterable[str] | None = None,
    devices: int = 1,
    sharding: Sharding = "none",
    say: Say | None = None,
    **keys: Any,
) -> list[Fit]:
    """Every method and setting whose start-up and step stay within a card or size, best first.

    Tried are the registered methods that train something (or `methods`), each with and without recomputed activations, in the
    number format asked for and in bfloat16, on the base as asked and packed to 8 and 4 bits, and with the batch cut into equal
    parts that are accumulated, until it fits. Best is what changes least of what was asked: nothing, then gradient_checkpointing,
    smaller batches that are accumulated, dtype, quantize; among equals, what trains most. Deep models of equal blocks are planned
    from shallow ones of the same kind.
    Raises ValueError where nothing fits, naming the closest; for a card that is not known.
    """
    asked, limit = planned_settings(settings, keys), budget(card_or_bytes)
    names = [name for name in (methods if methods is not None else sorted(registered())) if _trains(name)]
    config = read_config(asked)  # of a GGUF file this takes seconds
    one = partial(of_method, asked, config, devices, sharding, rates_of(asked.device), limit)
    found: list[Fit] = []
    closest: Fit | None = None
    refused: list[str] = []
    with in_turn_or_together(len(names)) as each:
        for name, (rows, nearest, why) in zip(names, each(one, names), strict=True):
            found += rows
            closest = min([row for row in (closest, nearest) if row], key=lambda row: row.peak, default=None)
            refused += [why] if why else []
            if say is not None:
                say(f"{name}: " + (f"{len(rows)} ways" if rows else f"left out ({why})" if why else "none"))
    if not found:
        if closest is None:
            raise ValueError(f"no method can be planned for this base: {next(iter(refused), 'none was named')}")
        raise ValueError(
            f"nothing fits {card_or_bytes} ({shown(limit)} usable); the closest is {closest.method}"
            + "".join(f", {key} {value}" for key, value in closest.changes.items())
            + f", with {shown(closest.peak)}: take a larger card, a smaller base, a shorter max_length, or fsdp over several"
        )
    return sorted(found, key=lambda row: cost(row, asked))


def _trains(method: str) -> bool:
    return method_class(method).trains != "nothing"


def of_method(
    asked: TrainSettings, config: Any, devices: int, sharding: Sharding, rates: Any, limit: int, method: str
) -> tuple[list[Fit], Fit | None, str]:
    """The ways of one method that fit, the one of all that needs least, and why others were refused ("" where none was)."""
    found: list[Fit] = []
    closest: Fit | None = None
    refused = ""
    for changes in ways(asked):
        try:
            for row in batches(asked, config, method, changes, devices, sharding, rates, limit):
                closest = row if closest is None or row.peak < closest.peak else closest
                if row.peak <= limit:
                    found.append(row)
                    break
        except (ValueError, TypeError, RuntimeError) as error:
            refused = refused or " ".join(str(error).split())
    return found, closest, refused


@contextmanager
def in_turn_or_together(count: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over `count` tasks: in as many processes as there are cores where they can be forked safely, else in this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1  # of systems that also fork
    if min(count, cores) < 2 or threading.active_count() > 1 or torch.cuda.is_initialized():
        yield map
        return
    with ProcessPoolExecutor(
        min(count, cores), get_context("fork"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield pool.map


def cost(row: Fit, asked: TrainSettings) -> tuple[Any, ...]:
    """What a row is sorted by: changes, the gravest first, then how much is trained."""
    steps = row.changes.get("gradient_accumulation_steps", asked.gradient_accumulation_steps)
    packed = [None, *sorted(QUANTISERS)].index(row.changes.get("quantize"))
    return packed, "dtype" in row.changes, steps, "gradient_checkpointing" in row.changes, -row.trained, row.method


def ways(asked: TrainSettings) -> Iterator[dict[str, Any]]:
    """Settings that may be changed, mild changes first."""
    packings: list[str | None] = [None]
    if asked.quantize is None and asked.base_format == "unpacked":
        packings += sorted(QUANTISERS)  # int8 before nf4
    dtypes = [None] + (["bfloat16"] if asked.dtype == "float32" else [])
    recompute = [None] + ([True] if not asked.gradient_checkpointing else [])
    for packing in packings:
        for dtype in dtypes:
            for again in recompute:
                every = {"gradient_checkpointing": again, "dtype": dtype, "quantize": packing}
                yield {key: value for key, value in every.items() if value is not None}


def batches(
    asked: TrainSettings,
    config: Any,
    method: str,
    changes: Mapping[str, Any],
    devices: int,
    sharding: Sharding,
    rates: Any,
    limit: int,
) -> Iterator[Fit]:
    """The batch asked for, then equal parts of it that are accumulated, down to single rows."""
    settings = with_method(asked, method, changes)
    rows = asked.per_device_train_batch_size
    for batch in (size for size in range(rows, 0, -1) if rows % size == 0):
        steps = asked.gradient_accumulation_steps * (rows // batch)
        now = replace(settings, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        plan = plan_deep(job_of(now, devices=devices, sharding=sharding, config=deepcopy(config)), rates)
        peak = max(plan.peak, plan.startup_peak)
        cut = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        cut = {} if batch == rows else cut
        yield Fit(method, {**changes, **cut}, peak, plan.trained, plan.adapter_bytes, plan.step_seconds, command(now))
        if plan.startup_peak > limit:
            return


def with_method(asked: TrainSettings, method: str, changes: Mapping[str, Any]) -> TrainSettings:
    """The settings with another method; options that it has as well are kept."""
    flat = asked.flat()
    for key in asked.method_options:
        if key not in option_names(method_class(method)):
            flat.pop(key, None)
    return read_settings({**flat, "method": method, **changes})


def command(settings: TrainSettings) -> str:
    """The command that runs these settings."""
    usual = {f.name: f.default for f in fields(TrainSettings)}
    words = ["loratory", "train", "--base", settings.base]
    for key, value in settings.flat().items():
        if key == "base" or (key in usual and value == usual[key]) or value in (None, [], ()):
            continue
        text = "DATA" if (key, value) == ("train", NO_DATA) else value
        words += [
            f"--{key}",
            str(text).lower()
            if isinstance(text, bool)
            else ",".join(map(str, text))
            if isinstance(text, list)
            else str(text),
        ]
    return shlex.join(words)
