"""Checking claims, and listing them with what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loratory.catalogue.claim import Claim, chosen, read_claims
from loratory.catalogue.ledger import RESULTS, default_folder, is_current, read_result, write_result

Say = Callable[[str], None]
RUNS = "claim-runs"


def claims(
    *names: str,
    method: str | None = None,
    kind: str | None = None,
    run: bool = False,
    again: bool = False,
    results: str | Path | None = None,
    out: str | Path = RUNS,
    say: Say = print,
    command: str = "",
) -> list[dict[str, Any]]:
    """The papers' claims, one row each with its verdict: `pandas.DataFrame(lt.claims())`.

    names, method, kind: which ones (kind: count, property, digits, compare, none). run: check those that have no result as they now stand;
    again: also those that have. results: folder of results; default: the package's own in a source checkout, else `claims`. out:
    folder of training runs, which a later call takes up again. Raises ValueError for a name, method or kind that there is not.
    """
    wanted = chosen(read_claims(), names, method, kind)
    folder = Path(results) if results is not None else default_folder()
    if folder.is_file():
        raise FileExistsError(f"results '{folder}' is a file; name a folder")
    places = list(dict.fromkeys([folder, RESULTS]))
    if run:
        run_claims(wanted, folder, places, Path(out), again=again, say=say, command=command)
    return [row(claim, read_result(claim, places)) for claim in wanted]


def run_claims(
    wanted: Iterable[Claim], folder: Path, places: list[Path], out: Path, *, again: bool, say: Say, command: str
) -> None:
    """Check each claim and write its result at once, so that a stopped call loses only the one that ran."""
    for claim in wanted:
        before = read_result(claim, places)
        if is_current(claim, before) and not again:
            say(
                f"{claim.name}: {(before or {})['verdict']} (checked {(before or {})['date']}; --again checks it again)"
            )
            continue
        say(f"{claim.name}: {claim.claim}")
        began = time.monotonic()
        found = check(claim, out, say, command)
        result = {
            "name": claim.name,
            "claim": claim.digest,
            "verdict": claim.verdict(found),
            "rule": claim.rule,
            "stated": claim.stated,
            "unit": claim.unit,
            **found,
            "reason": claim.reason or None,
            "seconds": round(time.monotonic() - began, 1),
            "versions": versions(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": command or f"loratory claims run {claim.name}",
        }
        write_result(folder, claim.name, result)
        say(f"{claim.name}: {told(claim, result)}")


def check(claim: Claim, out: Path, say: Say, command: str) -> dict[str, Any]:
    """What the claim's run gives: value, low, high and particulars. Raises ValueError for a function that there is not."""
    found: dict[str, Any] = {"value": None, "low": None, "high": None}
    if claim.kind == "none":
        return found
    if claim.kind == "compare":
        from loratory.catalogue.versus import versus

        more = versus(claim.name, claim.run, out, say, command or f"loratory claims run {claim.name}")
    else:
        functions = functions_of(claim.kind)
        settings = dict(claim.run)
        name = settings.pop("function", None)
        if name not in functions:
            raise ValueError(
                f"claim '{claim.name}' runs '{name}', which there is not; there are {', '.join(functions)}"
            )
        more = functions[name](**settings)
    ends = {key: more[key] for key in found if key in more}
    return found | ends | {"details": {key: value for key, value in more.items() if key not in found}}


def functions_of(kind: str) -> dict[str, Callable[..., dict[str, Any]]]:
    """What a claim of this kind can run, by name."""
    from loratory.catalogue.counts import COUNTS
    from loratory.catalogue.digits import DIGITS
    from loratory.catalogue.properties import PROPERTIES
    from loratory.catalogue.structure import STRUCTURE
    from loratory.catalogue.timing import TIMING

    return {"count": COUNTS, "property": PROPERTIES | STRUCTURE | TIMING, "digits": DIGITS}[kind]


def versions() -> dict[str, str]:
    from loratory.train.prints import versions

    return versions()


def row(claim: Claim, result: dict[str, Any] | None) -> dict[str, Any]:
    """A claim and its result, flat."""
    fields = ("name", "paper", "method", "kind", "claim", "setting", "stated", "unit", "rule")
    flat: dict[str, Any] = {field: getattr(claim, field) for field in fields}
    known = result if is_current(claim, result) else None
    verdict = "not checked" if result is None else "claim changed since" if known is None else known["verdict"]
    if claim.kind == "none" and known is None:
        verdict = "not checkable here"
    return flat | {
        "verdict": verdict,
        **{key: (known or {}).get(key) for key in ("value", "low", "high", "date", "command")},
        "reason": claim.reason or None,
    }


def told(claim: Claim, result: dict[str, Any]) -> str:
    """A result in one line."""
    if result["value"] is None:
        return f"{result['verdict']}: {claim.reason}"
    return f"{result['verdict']}: {number(result['value'])}{interval(result)} {claim.unit}, the paper {number(claim.stated)} ({claim.rule})"


def interval(result: dict[str, Any]) -> str:
    if result.get("low") is None or result.get("high") is None:
        return ""
    return f" [{number(result['low'])}, {number(result['high'])}]"


def number(value: float | None) -> str:
    """A number as people read it."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
