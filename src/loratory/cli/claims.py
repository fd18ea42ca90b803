"""`loratory claims`: what the papers claim, and what came of checking it."""

from __future__ import annotations

import json
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory claims [NAME ...] [--method M] [--kind K] [--json]\n       loratory claims run [NAME ...] [--method M] [--kind K] [--again] [--results DIR] [--out DIR] [--json]"
EPILOG = (
    "Kinds: count (numbers of the real shapes, no weights; seconds), property (a small experiment; seconds), compare (training runs under one "
    "budget; many minutes, and the same command goes on where it stopped), none (not checkable here). `run` needs names, a method or a kind, "
    "or --all. A result is kept until the claim's wording or rule changes."
)


@dataclass(frozen=True, kw_only=True)
class ClaimsSettings:
    """List the papers' claims with their verdicts, or check them."""

    names: list[str] = field(default_factory=list)  # claims, also without the flag; default: all that match
    method: str | None = None  # only claims of this method
    kind: str | None = None  # only claims of this kind: count, property, digits, compare, none
    all: bool = False  # with run: every claim
    again: bool = False  # with run: also those that have a result
    results: str | None = None  # folder of results; default: the package's own in a source checkout, else claims
    out: str = "claim-runs"  # folder of the training runs of compare claims
    json: bool = False  # print JSON


def run(arguments: Sequence[str]) -> int:
    words = list(arguments)
    if asks_help(words):
        print(verb_help(ClaimsSettings, USAGE, EPILOG))
        return 0
    runs = bool(words) and words[0] == "run"
    settings = parse(ClaimsSettings, words[1:] if runs else words, rest="names")
    if runs and not (settings.names or settings.method or settings.kind or settings.all):
        raise ValueError(
            "claims run does not know which to check; give names, --method, --kind, or --all (some train for many minutes)"
        )
    if not runs and (settings.again or settings.all):
        raise ValueError("--again and --all check claims; write `loratory claims run`")
    names = [name for word in settings.names for name in word.split(",") if name]
    from loratory.catalogue.check import claims
    from loratory.cli.quiet import quiet

    quiet()

    def say(text: str) -> None:
        print(text, file=sys.stderr if settings.json else sys.stdout, flush=True)

    rows = claims(
        *names,
        method=settings.method,
        kind=settings.kind,
        run=runs,
        again=settings.again,
        results=settings.results,
        out=settings.out,
        say=say,
        command=shlex.join(["loratory", "claims", *words]),
    )
    if settings.json:
        print(json.dumps(rows))
    elif len(names) == 1 and not runs:
        print(details(rows[0]))
    elif not runs:
        print(listing(rows))
    return 0


def listing(rows: Sequence[dict[str, Any]]) -> str:
    """A table, and how many claims came to what."""
    from loratory.catalogue.check import interval, number

    head = ("claim", "kind", "paper says", "here", "verdict")
    lines = [
        (
            row["name"],
            row["kind"],
            f"{number(row['stated'])} {row['unit']}",
            f"{number(row['value'])}{interval(row)}",
            row["verdict"],
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    text = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *lines)
    ]
    counts = {row["verdict"]: sum(r["verdict"] == row["verdict"] for r in rows) for row in rows}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join(
        [
            *text,
            "",
            f"{len(rows)} claims: {told}. `loratory claims NAME` shows one, `loratory claims run NAME` checks it.",
        ]
    )


def details(row: dict[str, Any]) -> str:
    """All of one claim."""
    from loratory.catalogue.check import interval, number

    here = f"{number(row['value'])}{interval(row)} {row['unit']}" if row["value"] is not None else "-"
    fields = {
        "claim": row["claim"],
        "paper": f"arXiv {row['paper']}",
        "setting": row["setting"],
        "paper says": f"{number(row['stated'])} {row['unit']}",
        "here": here,
        "rule": row["rule"],
        "verdict": row["verdict"],
        "reason": row["reason"],
        "checked": row["date"],
        "command": row["command"],
    }
    return "\n".join(
        textwrap.fill(f"{what:11} {value}", 110, subsequent_indent=" " * 12) for what, value in fields.items() if value
    )
