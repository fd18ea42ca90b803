"""What is compared: a method with settings of its own, and the learning rates that are tried for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from loratory.methods.registry import method_class, registered
from loratory.train.settings import canonical, is_bridge, plain

SHORT: dict[str, dict[str, Any]] = {  # names that mean a method with settings
    "rslora": {"method": "lora", "rslora": True},
    "lora+": {"method": "lora", "lr_ratio": 16.0},
}
GRIDS = {  # what is tried where no rates were given, by what a method trains; PEFT's tuners with few numbers want high rates
    "factors": (3e-4, 1e-3, 3e-3),
    "all": (3e-5, 1e-4, 3e-4),
    "head": (1e-3, 1e-2, 1e-1),
    "nothing": (),
    "peft": (1e-3, 1e-2, 1e-1),
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of a comparison. `settings` are flat train settings; an optimizer is one of them (`optim`), so an arm may be one."""

    label: str
    settings: dict[str, Any]
    rates: tuple[float, ...]  # empty: nothing is trained, so there is no rate

    def more(self, rate: float) -> Arm:
        """With one more rate to try."""
        return replace(self, rates=tuple(sorted({*self.rates, rate})))


def read_arms(given: Any, rates: Iterable[float] | None = None) -> tuple[Arm, ...]:
    """Arms from a list of labels ("lora", "lora rank=16", "peft:vera peft.r=64"), or from {label: settings}.

    The settings of a label in a table may hold `rates`, which go before the common ones.
    Raises ValueError for a method that does not exist, a label given twice, or a rate that is not above 0.
    """
    common = None if rates is None else tuple(rates)
    if isinstance(given, str):
        given = [part.strip() for part in given.split(",") if part.strip()]
    table = given if isinstance(given, Mapping) else None
    labels = [" ".join(str(label).split()) for label in given]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(
                f"methods names '{label}' twice; give each its own label, with what differs: '{label} rank=16'"
            )
    if not labels:
        raise ValueError("methods is empty; name at least one, for example lora,dora,peft:vera")
    return tuple(
        read_arm(label, (table or {}).get(original) or {}, common)
        for label, original in zip(labels, given, strict=True)
    )


def read_arm(label: str, given: Mapping[str, Any], rates: tuple[float, ...] | None) -> Arm:
    """An arm from its label, and what a table says of it."""
    if not isinstance(given, Mapping):
        raise TypeError(f"methods: what stands under '{label}' is {given!r}; it must be a table of settings")
    name, *words = label.split()
    settings = dict(SHORT.get(name.lower(), {}))
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"methods: '{word}' in '{label}' is no setting; write key=value, as in 'lora rank=16'")
        settings[key] = plain(value)
    own = {key: value for key, value in given.items() if key != "rates"}
    settings = {**settings, **own}
    settings.setdefault("method", name)
    settings = canonical(settings)
    kind = family(str(settings["method"]), label, settings)
    chosen = given.get("rates", rates)
    found = GRIDS[kind] if chosen is None else read_rates(label, chosen)
    return Arm(label=label, settings=settings, rates=() if kind == "nothing" else found)


def read_rates(label: str, given: Any) -> tuple[float, ...]:
    """Learning rates from a list, or from one number. Raises ValueError for none, or one that is not a number above 0."""
    several = given if isinstance(given, list | tuple) else [given]
    try:
        found = sorted({float(rate) for rate in several})
    except (TypeError, ValueError):
        found = []
    if not found or not all(rate > 0 and math.isfinite(rate) for rate in found):
        raise ValueError(f"rates of '{label}' are {given!r}; give at least one learning rate above 0: [1e-3, 1e-2]")
    return tuple(found)


def family(method: str, label: str, settings: Mapping[str, Any]) -> str:
    """What a method trains: a key of GRIDS. Raises ValueError with the nearest names for one that does not exist."""
    if is_bridge(method):
        from loratory.train.peft_bridge import tuner

        tuner(method)
        return "peft"
    known = registered()
    if method.lower().replace("_", "-") not in known:
        names = [*known, *SHORT]
        near = get_close_matches(method, names, n=3, cutoff=0.0)
        raise ValueError(
            f"methods: '{label}' is no method; nearest names: {', '.join(near)}; all: {', '.join(sorted(names))}, and peft:NAME"
        )
    trains = str(method_class(method).trains)
    return "head" if trains == "nothing" and settings.get("also_train") else trains
