"""What a field of a method may hold: its type says so.

Every method checks its fields when it is made: `Literal` by its values; bool, int and float as such; a number with limits by the check that
stands behind it in `Annotated`. None is allowed where the type has it. Fields of other types are the method's own to check.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Literal, Union

Check = Callable[[str, Any], None]


def check_positive_int(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} is {value!r}; it must be a positive integer")
    if value < 1:
        raise ValueError(f"{field} is {value}; it must be a positive integer")


def check_count(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{field} is {value!r}; it must be an integer, at least 0")


def check_positive(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field} is {value!r}; it must be a positive number")
    if not 0 < value < math.inf:
        raise ValueError(f"{field} is {value}; it must be a positive, finite number")


def check_not_negative(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field} is {value!r}; it must be a number, at least 0")
    if not 0 <= value < math.inf:
        raise ValueError(f"{field} is {value}; it must be a finite number, at least 0")


def check_share(field: str, value: Any, interval: Literal["[0, 1)", "(0, 1]", "(0, 1)"] = "[0, 1)") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field} is {value!r}; it must be a number in {interval}")
    if not 0 <= value <= 1 or (value == 0 and interval[0] == "(") or (value == 1 and interval[-1] == ")"):
        raise ValueError(f"{field} is {value}; it must lie in {interval}")


def check_choice(field: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; it must be one of {', '.join(map(str, allowed))}")


def _check_plain(field: str, value: Any, kinds: tuple[type, ...], words: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{field} is {value!r}; it must be {words}")


PositiveInt = Annotated[int, check_positive_int]
Count = Annotated[int, check_count]  # >= 0
Positive = Annotated[float, check_positive]
NotNegative = Annotated[float, check_not_negative]
Share = Annotated[float, check_share]  # in [0, 1)
PositiveShare = Annotated[float, functools.partial(check_share, interval="(0, 1]")]
InnerShare = Annotated[float, functools.partial(check_share, interval="(0, 1)")]
PLAIN: dict[Any, Check] = {
    bool: functools.partial(_check_plain, kinds=(bool,), words="True or False"),
    int: functools.partial(_check_plain, kinds=(int,), words="an integer"),
    float: functools.partial(_check_plain, kinds=(int, float), words="a number"),
}


def check_fields(method: Any) -> None:
    """Raises TypeError or ValueError, with the field, its value and what is allowed, where a field of a dataclass is not of its type.

    An int in the place of a float becomes one: torch.compile takes ints for constants, and compiles for each anew.
    """
    for field, (check, real, optional) in _checks(type(method)).items():  # type: ignore[arg-type]
        value = getattr(method, field)
        if value is not None:
            check(field, value)
            if real and isinstance(value, int):
                object.__setattr__(method, field, float(value))
        elif not optional:
            raise TypeError(f"{field} is None, which it cannot be; leave it out for its default")


@functools.cache
def _checks(cls: type[Any]) -> dict[str, tuple[Check, bool, bool]]:
    """Of each field whose type is one of those above: its check, whether it is a float, and whether it may be None."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError:  # of a class made inside a function, where a type is a string
        return {}
    found = {}
    for f in fields(cls):
        hint = hints[f.name]
        united = typing.get_origin(hint) in (Union, types.UnionType)
        kinds = [kind for kind in (typing.get_args(hint) if united else (hint,)) if kind is not type(None)]
        check = _check_of(kinds[0]) if len(kinds) == 1 else None
        if check is not None:
            real = float in (kinds[0], getattr(kinds[0], "__origin__", None))
            found[f.name] = check, real, united
    return found


def _check_of(kind: Any) -> Check | None:
    if typing.get_origin(kind) is Literal:
        return functools.partial(check_choice, allowed=typing.get_args(kind))
    if typing.get_origin(kind) is Annotated:
        kind = kind.__metadata__[0]
        return kind if callable(kind) else None
    return PLAIN.get(kind)
