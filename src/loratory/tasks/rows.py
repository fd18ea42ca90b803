"""Rows of data that know where they came from, and the checks every task makes on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]
KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


class Row(dict[str, Any]):
    """A row of data: column -> value, with the place it was read from."""

    __slots__ = ("origin",)

    def __init__(self, values: Mapping[str, Any], origin: str) -> None:
        super().__init__(values)
        self.origin = origin


def origin(row: Mapping[str, Any], index: int) -> str:
    """Where a row came from, for messages: its file and row number, or only its number."""
    return getattr(row, "origin", f"row {index + 1}")


def cell(row: Mapping[str, Any], index: int, column: str, setting: str, kinds: tuple[type, ...] = (str,)) -> Any:
    """The value of one column. Raises ValueError when it is missing, TypeError when its kind is wrong."""
    if column not in row:
        raise ValueError(
            f"{origin(row, index)}: column '{column}' is missing (columns found: {', '.join(row) or 'none'}); "
            f"add it, or name another column with {setting}="
        )
    value = row[column]
    if not isinstance(value, kinds):
        expected = " or ".join(KINDS[kind] for kind in kinds)
        raise TypeError(
            f"{origin(row, index)}: column '{column}' holds {value!r:.60} ({type(value).__name__}), "
            f"but {expected} is expected; correct the row"
        )
    return value


def first_row(rows: Rows, task: str) -> Mapping[str, Any]:
    """The row that decides the columns. Raises ValueError when there is none."""
    if not rows:
        raise ValueError(f"task '{task}' was given no rows; the data is empty")
    return rows[0]


def no_columns(row: Mapping[str, Any], task: str, tried: str, settings: str) -> ValueError:
    """The error for rows in which no known columns were found."""
    return ValueError(
        f"{origin(row, 0)}: task '{task}' finds no columns it knows (columns found: {', '.join(row) or 'none'}; "
        f"known: {tried}); name them with {settings}"
    )
