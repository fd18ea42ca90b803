"""Equal budgets: what each method may train, hold, write, or take, and the settings that keep it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from loratory.compare.arms import Arm
from loratory.methods.registry import method_class
from loratory.plan.cards import budget as size_of
from loratory.plan.file import file_bytes, saved_tensors
from loratory.train.planned import job_of, plan
from loratory.train.settings import TrainSettings, canonical, is_bridge, plain, read_settings

KINDS = ("steps", "trained", "memory", "adapter_bytes", "seconds")
UNITS = {
    "trained": "numbers",
    "memory": "bytes at the peak",
    "adapter_bytes": "bytes of adapter",
    "seconds": "s",
    "steps": "steps",
}
KNOBS = (
    "rank",
    "tokens",
    "peft.r",
    "peft.init_r",
    "peft.oft_block_size",
    "peft.num_virtual_tokens",
    "peft.n_frequency",
)
LARGEST = 4096  # the largest rank that is tried


@dataclass(frozen=True)
class Budget:
    """The same amount for every method; prints as it is given."""

    kind: str
    amount: float

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:.0f}"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a budget makes of an arm."""

    changes: dict[str, Any]  # settings that keep it within the budget
    used: float | None  # of the budget; None where it is known only once it runs
    note: str


class OverBudget(ValueError):
    """An arm that cannot stay within the budget; `least` is the nearest it comes."""

    def __init__(self, arm: Arm, budget: Budget, least: float, why: str) -> None:
        super().__init__(f"'{arm.label}' cannot stay within {budget}: {why}")
        self.label, self.least = arm.label, least


class NotTimed(RuntimeError):
    """An arm whose steps could not be timed, so that a budget of seconds gives it no number of steps."""

    def __init__(self, arm: Arm, why: str) -> None:
        super().__init__(f"'{arm.label}' could not be timed: {why}")
        self.label = arm.label


def read_budget(given: str | None) -> Budget | None:
    """A budget from `kind=amount`; sizes may have units. Raises ValueError for another kind or an amount that is not above 0."""
    if given is None:
        return None
    kind, equals, text = given.partition("=")
    kind = kind.strip().replace("-", "_")
    if kind not in KINDS or not equals:
        raise ValueError(
            f"budget is '{given}'; it must be kind=amount with one of {', '.join(KINDS)}, as in trained=500000"
        )
    text = text.strip().replace("_", "").replace(",", "")
    amount = size_of(text) if kind in ("memory", "adapter_bytes") and not text.isdigit() else plain(text)
    if isinstance(amount, bool) or not isinstance(amount, int | float) or amount <= 0:
        raise ValueError(f"budget {kind} is '{text}'; it must be a number above 0")
    return Budget(kind, float(amount))


def fit_arm(arm: Arm, keys: Mapping[str, Any], budget: Budget) -> Fitted:
    """The settings that keep an arm within the budget (`seconds` is met by timing it: see engine). Raises OverBudget."""
    if budget.kind == "steps":
        return Fitted(changes={"max_steps": int(budget.amount)}, used=budget.amount, note=f"{budget.amount:.0f} steps")
    if budget.kind == "memory":
        return fit_memory(arm, keys, budget)
    return fit_size(arm, keys, budget, trained_numbers if budget.kind == "trained" else adapter_bytes)


def fit_size(arm: Arm, keys: Mapping[str, Any], budget: Budget, measure: Callable[[TrainSettings], int]) -> Fitted:
    """The rank (or what stands for it) that comes closest without going above, by counting on the meta device."""

    refused: list[Exception] = []

    def count(value: int | None) -> int | None:
        changes = {} if value is None or name is None else with_rank(name, value)
        try:
            return measure(read_settings({**canonical(keys), **changes}))
        except (ValueError, TypeError, AssertionError, RuntimeError) as error:  # this rank is not possible
            if value is None:
                raise
            refused.append(error)
            return None

    name = knob(keys)
    if name is None or name in arm.settings:
        used, what = count(None) or 0, "it has no rank to lower" if name is None else f"{name} is given"
        if used > budget.amount:
            raise OverBudget(arm, budget, used, f"{what}, and it needs {used:,} {UNITS[budget.kind]}")
        return Fitted(changes={}, used=used, note=f"{used:,} {UNITS[budget.kind]} ({what})")
    found = closest(cache(count), budget.amount)
    if found is None:
        counted = {rank: n for rank in (1, 2, 4, 8, 16, 32, 64, 128, 256) if (n := count(rank)) is not None}
        if not counted:  # it is not the rank: a wrong `where`, for example
            raise refused[0]
        rank, used = min(counted.items(), key=lambda pair: pair[1])
        raise OverBudget(arm, budget, used, f"with {name} {rank} it still needs {used:,} {UNITS[budget.kind]}")
    rank, used = found
    note = f"{name} {rank}: {used:,} {UNITS[budget.kind]}, {used / budget.amount:.1%} of the budget"
    return Fitted(changes=with_rank(name, rank), used=used, note=note)


def closest(count: Callable[[int], int | None], limit: float) -> tuple[int, int] | None:
    """(rank, count) of the largest count that is not above the limit: powers of two, then between the best one's neighbours."""
    best: tuple[int, int] | None = None

    def consider(rank: int) -> bool:
        nonlocal best
        used = count(rank)
        inside = used is not None and used <= limit
        if inside and used is not None and (best is None or used > best[1]):
            best = (rank, used)
        return inside

    rank, failures = 1, 0
    while rank <= LARGEST and failures < 4:  # some ranks divide no layer, and larger ones do
        failures = 0 if count(rank) is not None else failures + 1
        consider(rank)
        rank *= 2
    if best is None:
        return None
    start = best[0]
    for outer in (2 * start, start // 2):  # counts grow with the rank, or fall with it
        inside, outside = start, outer
        while abs(outside - inside) > 1:
            middle = (inside + outside) // 2
            if consider(middle):
                inside = middle
            else:
                outside = middle
    return best


def knob(keys: Mapping[str, Any]) -> str | None:
    """The setting that makes a method larger or smaller."""
    method = str(keys["method"])
    if is_bridge(method):
        from loratory.train.peft_bridge import tuner

        names, kind = set(tuner(method).kinds()), tuner(method).kind
        first = {"OFT": "peft.oft_block_size", "ADALORA": "peft.init_r"}.get(kind)
        return first or next((name for name in KNOBS if name in names), None)
    names = {f.name for f in fields(method_class(method))}
    return next((name for name in KNOBS if name in names), None)


def with_rank(name: str, value: int) -> dict[str, Any]:
    if name == "peft.init_r":  # AdaLoRA prunes from init_r to target_r
        return {name: value, "peft.target_r": max(1, value * 2 // 3)}
    return {name: value} | ({"peft.r": 0} if name == "peft.oft_block_size" else {})


def attached(settings: TrainSettings) -> Any:
    """The adapted base without data."""
    from loratory.tasks import make_task
    from loratory.train.run import adapt, silent

    task = make_task(settings.task, **settings.task_options)
    return adapt(job_of(settings).build(), settings, task, max(1, settings.max_steps), silent)


def trained_numbers(settings: TrainSettings) -> int:
    """Numbers that a run trains, new heads included."""
    return int(attached(settings).summary().trained)


def adapter_bytes(settings: TrainSettings) -> int:
    """Bytes of the file that a run ends with."""
    model = attached(settings).model
    if is_bridge(settings.method):
        from peft import get_peft_model_state_dict

        return file_bytes({name: t.contiguous() for name, t in get_peft_model_state_dict(model).items()})
    return file_bytes(saved_tensors(model))


def fit_memory(arm: Arm, keys: Mapping[str, Any], budget: Budget) -> Fitted:
    """The largest batch that fits, as many rows in a step as asked for."""
    settings = read_settings(dict(keys))
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    least = 0
    for batch in (size for size in range(rows, 0, -1) if rows % size == 0):
        changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": rows // batch}
        planned = plan({**canonical(keys), **changes})
        least = max(planned.peak, planned.startup_peak)
        if least <= budget.amount:
            note = f"batches of {batch}, {rows // batch} a step: {least:,} bytes planned, {least / budget.amount:.1%} of the budget"
            return Fitted(changes=changes, used=least, note=note)
    raise OverBudget(arm, budget, least, f"with one row at a time it still needs {least:,} bytes")


def none_fits(budget: Budget, refused: list[OverBudget | NotTimed]) -> ValueError:
    """The error for a budget that no method can meet."""
    over = [each for each in refused if isinstance(each, OverBudget)]
    if not over:
        return ValueError(f"budget {budget} gives no method its steps; {refused[0]}: mend that, or give steps=N")
    nearest = min(over, key=lambda each: each.least)
    return ValueError(
        f"budget {budget} can be met by no method; the closest is '{nearest.label}' with {nearest.least:,.0f} "
        f"{UNITS[budget.kind]}: raise the budget, or name smaller methods"
    )
