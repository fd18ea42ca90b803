"""`loratory inspect`: what an adapter file holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory inspect ADAPTER [--json | --card]"


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """Show what an adapter file holds; its base is not needed."""

    adapter: str  # adapter folder (ours or PEFT's), output_dir of a run, or hub name
    json: bool = False  # print everything as JSON
    card: bool = False  # print a model card (README.md)


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(InspectSettings, USAGE))
        return 0
    settings = parse(InspectSettings, arguments, positional=("adapter",))
    import loratory as lt
    from loratory.train import peft_bridge

    bridged = peft_bridge.find_bridged(settings.adapter)
    found = peft_bridge.inspect_bridged(bridged) if bridged is not None else lt.inspect(settings.adapter)
    if settings.card:
        from loratory.store.card import card

        print(card(found), end="")
        return 0
    print(json.dumps(asdict(found) | {"numbers": found.numbers}, default=str) if settings.json else found)
    return 0
