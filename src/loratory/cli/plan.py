"""`loratory plan`: what a run will need, before it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loratory.cli.arguments import asks_help, flags_of, help_text, read_flags
from loratory.cli.train import groups, read_keys
from loratory.train.settings import TrainSettings, canonical, chosen, convert

USAGE = "loratory plan [--config FILE.yaml] [--KEY VALUE ...] [--card CARD | --fit CARD] [--json]"


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Say what a run will need: memory by part, start-up, file, time. No weights are loaded, no data is read."""

    card: str | None = (
        None  # say whether it fits a card (RTX 4090, A100-80, ...) or a size (24GB), and the largest batch
    )
    fit: str | None = None  # list every method and setting that fits this card or size, best first
    devices: int = 1  # processes of one device each
    sharding: Literal["none", "ddp", "fsdp"] | None = (
        None  # what each device holds; default with several: ddp, or the run's fsdp
    )
    calibrate: bool = False  # time this machine first (two seconds, remembered), for the time of a step
    json: bool = False  # print everything as JSON


OWN = tuple(PlanSettings.__dataclass_fields__)


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(plan_help([word for word in arguments if word not in ("-h", "--help")]))
        return 0
    asked, words = own_flags(arguments)
    keys = read_keys(words)
    from loratory.cli.quiet import quiet
    from loratory.train.fit import fit
    from loratory.train.planned import plan, planned_settings

    quiet()
    settings = planned_settings(keys, {})
    sharding = asked.sharding or sharding_of(settings, asked.devices)
    if asked.fit is not None:
        rows = fit(
            settings,
            asked.fit,
            devices=asked.devices,
            sharding=sharding,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        print(json.dumps([row.to_json() for row in rows]) if asked.json else table(rows))
        return 0
    found = plan(settings, devices=asked.devices, sharding=sharding, calibrate=asked.calibrate)
    largest = None if asked.card is None else found.largest_batch(asked.card)
    if asked.json:
        extra = (
            {} if asked.card is None else {"card": asked.card, "fits": found.fits(asked.card), "largest_batch": largest}
        )
        print(json.dumps(found.to_json() | extra, default=str))
        return 0
    print(found)
    if asked.card is not None:
        print(verdict(found, asked.card, int(largest or 0)))
    return 0


def own_flags(arguments: Sequence[str]) -> tuple[PlanSettings, list[str]]:
    """The flags of the verb itself, and the words that belong to the run."""
    import typing

    hints = typing.get_type_hints(PlanSettings)
    mine: list[str] = []
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name = word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""
        if name not in OWN:
            rest.append(word)
            continue
        mine.append(word)
        if "=" not in word and hints[name] is not bool and words:
            mine.append(words.pop(0))
    flags, _ = read_flags(mine, hints)
    return PlanSettings(**convert({key.replace("-", "_"): value for key, value in flags.items()}, hints)), rest


def sharding_of(settings: TrainSettings, devices: int) -> Any:
    """What the run itself says."""
    if devices == 1:
        return "none"
    return "fsdp" if settings.training_options.get("fsdp") else "ddp"


def verdict(found: Any, card: str, largest: int) -> str:
    """One line: whether it fits, and the largest batch."""
    from loratory.plan.cards import budget, shown

    limit, need = budget(card), max(found.peak, found.startup_peak)
    if need <= limit:
        return f"fits {card} ({shown(limit)} usable), {shown(limit - need)} to spare; largest batch {largest}"
    over = f"does not fit {card} ({shown(limit)} usable): {shown(need - limit)} too much"
    if found.startup_peak > limit:
        return f"{over} at the start already; a packed .gguf base, or a smaller one, starts with less"
    return f"{over}; " + (f"largest batch {largest}" if largest else "not even one row fits; `--fit` lists what does")


def table(rows: Sequence[Any]) -> str:
    """The rows of `fit`, best first."""
    from loratory.plan.cards import shown

    lines = [f"{'method':15}{'peak':>11}{'file':>11}{'trained':>14}{'step':>9}  changes"]
    for row in rows:
        seconds = "" if row.step_seconds is None else f"{row.step_seconds:.3g} s"
        changes = ", ".join(f"{key} {value}" for key, value in row.changes.items()) or "none"
        lines.append(
            f"{row.method:15}{shown(row.peak):>11}{shown(row.adapter_bytes):>11}{row.trained:>14,}{seconds:>9}  {changes}"
        )
    return "\n".join([*lines, "", f"the first one: {rows[0].command}"])


def plan_help(words: Sequence[str]) -> str:
    """The help: the verb's own flags, then those of a run."""
    flags, _ = read_flags(own_flags(words)[1], {})
    names = {key: value for key, value in canonical(flags).items() if key in ("method", "task")}
    epilog = (
        "Every row of a batch counts as max_length tokens long. --train may be left out. A size in GB means 1e9 bytes, in GiB 2**30; of a "
        "card, 768 MiB are kept for the driver. The same flags with `loratory train` run what was planned."
    )
    own = ("Plan", flags_of(PlanSettings))
    return help_text(USAGE, str(PlanSettings.__doc__), [own, *groups(*chosen(names))], epilog)
