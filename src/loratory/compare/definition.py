"""What a comparison is, as its results file keeps it: fixed at the start, then only ever added to."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

from loratory.compare.arms import Arm
from loratory.compare.budget import Fitted, NotTimed, OverBudget, fit_arm, none_fits
from loratory.compare.results import Results
from loratory.compare.settings import CompareSettings, run_keys
from loratory.compare.splits import fingerprint, read_splits, text_of
from loratory.tasks import make_task
from loratory.tasks.data import Data
from loratory.train.settings import OF_NO_CONSEQUENCE, read_settings

LABELS = {  # metric -> its label with the unit, and what a score is multiplied with for it
    "accuracy": ("accuracy (%)", 100.0),
    "f1": ("entity F1 (%)", 100.0),
    "token_loss": ("loss (nats a token)", 1.0),
    "bleu": ("BLEU (0 to 100)", 1.0),
    "chrf": ("chrF (0 to 100)", 1.0),
}
Say = Callable[[str], None]
Timed = Callable[
    [Arm, dict[str, Any], str], float
]  # (arm, train settings, fingerprint of the rows) -> seconds of a step


def define(settings: CompareSettings, results: Results, *, timed: Timed, say: Say, command: str) -> dict[str, Any]:
    """The comparison that the settings ask for, added to the one the results file holds.

    Raises ValueError where the two cannot be mixed: other rows, another base, task, budget or setting.
    """
    arms = settings.arms()
    first = read_settings(run_keys(settings, arms[0]))
    data = read_splits(first)
    task = make_task(first.task, **first.task_options).resolve(data.train)
    metric = settings.metric or task.best_metric[0]
    task.check_by_row(metric)
    shared = {key: value for key, value in settings.shared.items() if key not in OF_NO_CONSEQUENCE}
    rows = {"train": len(data.train), "dev": len(data.dev), "test": len(data.test)}
    asked = {
        "task": first.task,
        "base": first.base,
        "metric": metric,
        "budget": str(settings.limit() or ""),
        "shared": json.loads(json.dumps(shared)),
    }
    before = results.definition()
    if before is not None:
        refuse_other_rows(before, fingerprint(data), rows, results)
        refuse_other_settings(before, asked, arms, results)
    else:
        results.add_texts([text_of(row) for row in data.test])
    old: dict[str, Any] = before["arms"] if before else {}
    refused: dict[str, str] = dict(before["refused"]) if before else {}
    new = [arm for arm in arms if arm.label not in old]  # those refused before too: they may have other settings now
    print_of_rows = before["fingerprint"] if before else fingerprint(data)
    fitted, over = fit_all(new, settings, data, print_of_rows, timed, say)
    refused = {label: why for label, why in refused.items() if label not in fitted}
    refused |= {each.label: str(each) for each in over}
    if (limit := settings.limit()) is not None and not old and not fitted:
        raise none_fits(limit, over)
    by_label = {arm.label: arm for arm in arms}
    kept = {
        label: {**arm, "rates": sorted({*arm["rates"], *(by_label[label].rates if label in by_label else ())})}
        for label, arm in old.items()
    }
    added = {
        arm.label: {
            "settings": arm.settings,
            "rates": list(arm.rates),
            "changes": fitted[arm.label].changes,
            "used": fitted[arm.label].used,
            "note": fitted[arm.label].note,
            "extended": 0,
        }
        for arm in new
        if arm.label in fitted
    }
    labels = [*kept, *added]
    seeds = list(dict.fromkeys([*(before["seeds"] if before else ()), *settings.all_seeds()]))
    baseline = settings.baseline or (before["baseline"] if before else labels[0])
    body = {
        **asked,
        "name": settings.name or settings.preset or (before["name"] if before else first.task),
        "greater_is_better": (metric == task.best_metric[0] and task.best_metric[1]) or metric in ("bleu", "chrf"),
        "dev_metric": task.best_metric[0],
        "dev_greater": task.best_metric[1],
        "baseline": baseline if baseline in labels else labels[0],
        "seeds": seeds,
        "search_seeds": settings.search_seeds or (before["search_seeds"] if before else len(seeds)),
        "rows": rows,
        "fingerprint": print_of_rows,
        "arms": kept | added,
        "refused": refused,
        "created": before["created"] if before else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": machine(),
        "command": command or (before["command"] if before else ""),
    }
    if settings.search_seeds is None and (before is None or before["search_seeds"] == len(before["seeds"])):
        body["search_seeds"] = len(seeds)
    results.define(body)
    return json.loads(json.dumps(body))


def fit_all(
    arms: list[Arm], settings: CompareSettings, data: Data, rows: str, timed: Timed, say: Say
) -> tuple[dict[str, Fitted], list[OverBudget | NotTimed]]:
    """What the budget makes of each arm, and why others are left out."""
    limit = settings.limit()
    fitted: dict[str, Fitted] = {}
    over: list[OverBudget | NotTimed] = []
    for arm in arms:
        keys = run_keys(settings, arm)
        try:
            if limit is None:
                fitted[arm.label] = Fitted(changes={}, used=None, note="")
            elif limit.kind == "seconds":
                seconds = timed(arm, keys, rows) if arm.rates else 0.0
                steps = max(1, int(limit.amount / seconds)) if seconds else 1
                note = f"{seconds:.3f} s a step, so {steps} steps (without measuring on dev)"
                fitted[arm.label] = Fitted(
                    changes={"max_steps": steps} if seconds else {}, used=steps * seconds, note=note
                )
            else:
                fitted[arm.label] = fit_arm(arm, keys | labels_of(keys, data), limit)
        except (OverBudget, NotTimed) as refusal:
            over.append(refusal)
            say(f"left out: {refusal}")
            continue
        if fitted[arm.label].note:
            say(f"{arm.label}: {fitted[arm.label].note}")
    return fitted, over


def labels_of(keys: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """The labels that the training rows bring: the head's size depends on them."""
    settings = read_settings(keys)
    task: Any = make_task(settings.task, **settings.task_options).resolve(data.train)
    return {"labels": list(task.labels)} if getattr(task, "labels", ()) else {}


def refuse_other_rows(before: Mapping[str, Any], now: str, rows: dict[str, int], results: Results) -> None:
    if before["fingerprint"] == now:
        return
    counts = ", ".join(f"{split} {before['rows'][split]} then, {rows[split]} now" for split in rows)
    raise ValueError(
        f"the rows have changed since '{results.file.parent}' was begun ({counts}), so its runs and new ones cannot be compared; "
        "put the rows back, or start another comparison with another out"
    )


def refuse_other_settings(
    before: Mapping[str, Any], asked: Mapping[str, Any], arms: tuple[Arm, ...], results: Results
) -> None:
    then, now = (dict(each["shared"]) | {k: each[k] for k in asked if k != "shared"} for each in (before, asked))
    changed = [
        f"{key} was {then.get(key)!r}, now {now.get(key)!r}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    for arm in arms:
        known = before["arms"].get(arm.label)
        if known is not None and known["settings"] != json.loads(json.dumps(arm.settings)):
            changed.append(
                f"'{arm.label}' was {known['settings']}, now {arm.settings} (give the new one a label of its own)"
            )
    if changed:
        raise ValueError(
            f"'{results.file.parent}' holds another comparison: {'; '.join(changed)}; methods, seeds and rates may be added to it, "
            "for the rest start another one with another out"
        )


def machine() -> dict[str, str]:
    import torch

    found = {"system": platform.system(), "processor": platform.machine(), "cores": str(os.cpu_count())}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})
