"""`loratory methods`: the methods there are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from loratory.cli.arguments import asks_help, parse, verb_help


@dataclass(frozen=True, kw_only=True)
class MethodsSettings:
    """List the methods, those of other installed packages included."""

    json: bool = False  # print JSON


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(MethodsSettings, "loratory methods [--json]"))
        return 0
    settings = parse(MethodsSettings, arguments)
    import loratory as lt

    rows = lt.methods()
    if settings.json:
        print(json.dumps([row._asdict() for row in rows]))
        return 0
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:{width}}  {row.description}" + ("" if row.package == "loratory" else f"  [{row.package}]"))
    print("\n`loratory train --method NAME --help` shows a method's own settings.")
    return 0
