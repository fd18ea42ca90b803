"""What came of checking claims: one JSON file each, kept beside the claims."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loratory
from loratory.catalogue.claim import Claim
from loratory.store.atomic import to_json, write_files

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


def default_folder() -> Path:
    """Where new results go: beside the claims in a source checkout, else a folder where the user works."""
    checkout = Path(loratory.__file__).resolve().parents[2]
    return RESULTS if (checkout / "pyproject.toml").is_file() else Path("claims")


def read_result(claim: Claim, folders: list[Path]) -> dict[str, Any] | None:
    """The claim's result, from the first folder that has one. Raises ValueError for a file that is none."""
    for folder in folders:
        file = folder / f"{claim.name}.json"
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(
                f"'{file}' is no result of a claim (it is not JSON); delete it, and run the claim again"
            ) from None
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise ValueError(f"'{file}' is no result of schema {SCHEMA}; delete it, and run the claim again")
        return found
    return None


def is_current(claim: Claim, result: dict[str, Any] | None) -> bool:
    """Whether a result is of the claim as it now stands."""
    return result is not None and result["claim"] == claim.digest


def write_result(folder: Path, name: str, result: dict[str, Any]) -> Path:
    write_files(folder, {f"{name}.json": to_json({"schema": SCHEMA, **result})})
    return folder / f"{name}.json"
