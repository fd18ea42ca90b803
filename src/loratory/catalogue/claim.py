"""A claim of a paper: what it says, how it is checked, and when it holds. One small YAML file each, written before its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

CLAIMS = Path(__file__).parent / "claims"
Kind = Literal["count", "property", "digits", "compare", "none"]
Verdict = Literal["holds", "not seen", "differs", "not checkable here"]
KINDS: tuple[str, ...] = get_args(Kind)
PARTS = ("value", "low", "high")


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where a number must lie: one of the value and the ends of its interval, both limits included."""

    of: str = "value"
    least: float | None = None
    most: float | None = None

    def met(self, found: Mapping[str, float | None]) -> bool:
        number = found.get(self.of)
        if number is None:
            return False
        return (self.least is None or number >= self.least) and (self.most is None or number <= self.most)

    def __str__(self) -> str:
        what = {"value": "", "low": "low end of the interval ", "high": "high end of the interval "}[self.of]
        ends = [] if self.least is None else [f"at least {self.least:g}"]
        ends += [] if self.most is None else [f"at most {self.most:g}"]
        return what + (f"exactly {self.least:g}" if self.least == self.most else " and ".join(ends))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper claims, its number, and the rule for the verdict.

    kind: `count` (numbers of the real shapes, on the meta device), `property` (a small numeric experiment), `digits` (training a
    small network), `compare` (training runs under one budget), `none` (not checkable here, for the stated reason). Without `differs`, what does not hold differs;
    with it, what is in neither was not seen.
    """

    name: str
    paper: str  # arXiv id
    method: str
    claim: str
    setting: str
    stated: float  # the paper's number
    unit: str
    kind: str
    run: dict[str, Any] = field(default_factory=dict)
    holds: Bounds | None = None
    differs: Bounds | None = None
    reason: str = ""

    def verdict(self, found: Mapping[str, float | None]) -> Verdict:
        """What a measured number makes of the claim."""
        if self.holds is None:
            return "not checkable here"
        if self.holds.met(found):
            return "holds"
        return "differs" if self.differs is None or self.differs.met(found) else "not seen"

    @property
    def rule(self) -> str:
        """When it holds and when it differs, in words."""
        if self.holds is None:
            return "-"
        return f"holds: {self.holds}; differs: {self.differs if self.differs is not None else 'otherwise'}"

    @cached_property
    def digest(self) -> str:
        """Of everything on which a verdict rests: a result of another wording is none of this one."""
        said = {key: value for key, value in vars(self).items() if key != "digest"}
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=vars).encode()).hexdigest()


def read_claims(folder: Path = CLAIMS) -> dict[str, Claim]:
    """All claims by name. Raises ValueError naming the file and what is wrong in it."""
    return {file.stem: read_claim(file) for file in sorted(folder.glob("*.yaml"))}


def read_claim(file: Path) -> Claim:
    """One claim. Raises ValueError for a file that is none."""
    import yaml

    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"claim '{file.stem}' is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ValueError(f"claim '{file.stem}' holds {type(given).__name__}; it must be a table of fields")
    known = [name for name in Claim.__dataclass_fields__ if name != "name"]
    needed = ("paper", "method", "claim", "setting", "stated", "unit", "kind")
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"claim '{file.stem}' has the field '{key}', which there is not; nearest: {near}")
    for key in needed:
        if key not in given:
            raise ValueError(f"claim '{file.stem}' has no field '{key}'; it needs {', '.join(needed)}")
    if given["kind"] not in KINDS:
        raise ValueError(f"claim '{file.stem}' is of kind '{given['kind']}'; it must be {', '.join(KINDS)}")
    if isinstance(given["stated"], bool) or not isinstance(given["stated"], int | float):
        raise ValueError(f"claim '{file.stem}' has stated '{given['stated']}'; it must be the paper's number")
    checkable = given["kind"] != "none"
    if checkable and not ("run" in given and "holds" in given):
        raise ValueError(f"claim '{file.stem}' of kind {given['kind']} has no run or no rule holds; it needs both")
    if not checkable and not given.get("reason"):
        raise ValueError(f"claim '{file.stem}' is of kind none without a reason; say why it cannot be checked")
    bounds = {key: read_bounds(file.stem, key, given[key]) for key in ("holds", "differs") if key in given}
    return Claim(name=file.stem, **{**given, "paper": str(given["paper"]), **bounds})


def read_bounds(name: str, key: str, given: Any) -> Bounds:
    if (
        not isinstance(given, dict)
        or not given.keys() <= {"of", "least", "most"}
        or not given.keys() & {"least", "most"}
    ):
        raise ValueError(
            f"claim '{name}' has {key} {given!r}; it must be least and most, and of with {', '.join(PARTS)}"
        )
    if given.get("of", "value") not in PARTS:
        raise ValueError(f"claim '{name}' has {key} of '{given['of']}'; it must be {', '.join(PARTS)}")
    return Bounds(**given)


def chosen(
    claims: Mapping[str, Claim], names: Iterable[str] = (), method: str | None = None, kind: str | None = None
) -> list[Claim]:
    """The claims of these names, method and kind. Raises ValueError for a name, method or kind that there is not."""
    for name in names:
        if name not in claims:
            near = get_close_matches(name, claims, n=3, cutoff=0.0)
            raise ValueError(f"there is no claim '{name}'; nearest: {', '.join(near)}; `loratory claims` lists all")
    methods = sorted({claim.method for claim in claims.values()})
    if method is not None and method not in methods:
        raise ValueError(f"there is no claim of method '{method}'; there are claims of {', '.join(methods)}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is '{kind}'; it must be {', '.join(KINDS)}")
    wanted = list(names) or list(claims)
    found = [
        claims[name] for name in wanted if method in (None, claims[name].method) and kind in (None, claims[name].kind)
    ]
    if not found:
        raise ValueError(
            "no claim is of all that was asked for: " + ", ".join(str(word) for word in (*names, method, kind) if word)
        )
    return found
