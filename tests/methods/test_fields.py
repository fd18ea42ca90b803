"""Fields of every method against their types: what is refused, and that the limits in the comments are the limits of the types."""

import dataclasses
import re
import typing
from dataclasses import dataclass
from typing import Literal

import pytest

import loratory as lt
from loratory.methods.fields import Count, InnerShare, NotNegative, Positive, PositiveInt, PositiveShare, Share
from loratory.methods.registry import method_class
from loratory.train.settings import field_docs

PLANTED = [
    ("None goes where there is a value", "elif not optional:", "elif False:"),
    ("a value is not checked where None may stand", "if value is not None:", "if value is not None and not optional:"),
    ("ints stay where floats belong", "if real and isinstance(value, int):", "if False:"),
    ("counts become floats", "if real and isinstance(value, int):", "if isinstance(value, int):"),
    ("counts below 0", "not isinstance(value, int) or value < 0", "not isinstance(value, int)"),
    ("an interval that is closed at its upper end", 'interval[-1] == ")"', 'interval[-1] == "]"'),
    ("the limits of a number are not read", "return kind if callable(kind) else None", "return None"),
]


@dataclass(frozen=True, kw_only=True)
class Every(lt.Method):
    """Every: a field of each kind."""

    choice: Literal["one", "two", 3] = "one"
    switch: bool = False
    seed: int = 0
    scale: float = 1.0
    rank: PositiveInt | None = None
    count: Count = 0
    rate: Positive = 1.0
    weight: NotNegative = 0.0
    dropout: Share = 0.0
    part: PositiveShare = 1.0
    beta: InnerShare | None = 0.5
    names: tuple[str, ...] = ()


ALLOWED = {
    "choice": ["two", 3],
    "switch": [True],
    "seed": [-1],
    "scale": [-2, 0.5],
    "rank": [1, None],
    "count": [0, 7],
    "rate": [1, 1e-9],
    "weight": [0, 3.5],
    "dropout": [0, 0.99],
    "part": [1, 0.01],
    "beta": [0.01, None],
    "names": [("a",), 7],
}
REFUSED = {
    "choice": (["three", "3", None], "one of one, two, 3"),
    "switch": ([1, "yes", None], "True or False"),
    "seed": ([True, 1.0, "0", None], "an integer"),
    "scale": ([True, "1", None], "a number"),
    "rank": ([0, -1, 2.0, True, "8"], "a positive integer"),
    "count": ([-1, 2.0, True, None], "an integer, at least 0"),
    "rate": ([0, -1, float("inf"), float("nan"), True, "1", None], "a positive"),
    "weight": ([-1e-9, float("inf"), float("nan"), False, "0", None], "at least 0"),
    "dropout": ([1, -0.1, float("nan"), True, "0", None], "in [0, 1)"),
    "part": ([0, 1.1, "1", None], "in (0, 1]"),
    "beta": ([0, 1, "0.5"], "in (0, 1)"),
}


@pytest.mark.parametrize("field", ALLOWED)
def test_values_of_its_type_are_taken(field):
    for value in ALLOWED[field]:
        assert getattr(Every(**{field: value}), field) == value


@pytest.mark.parametrize("field", REFUSED)
def test_others_are_refused_with_the_field_the_value_and_what_is_allowed(field):
    values, allowed = REFUSED[field]
    for value in values:
        said = "which it cannot be; leave it out" if value is None else allowed
        with pytest.raises((TypeError, ValueError), match=rf"^{field} is {re.escape(repr(value))}.*{re.escape(said)}"):
            Every(**{field: value})


def test_an_int_in_the_place_of_a_float_becomes_one():
    """torch.compile takes an int for a constant, and compiles for each anew."""
    made = Every(scale=2, rate=3, weight=0, part=1, rank=4, count=5)
    assert [type(getattr(made, n)) for n in ("scale", "rate", "weight", "part")] == [float] * 4
    assert [type(getattr(made, n)) for n in ("rank", "count", "seed")] == [int] * 3
    assert (made.scale, made.rate, made.beta) == (2, 3, 0.5)
    assert made == Every(scale=2.0, rate=3.0, rank=4, count=5)


def test_a_class_whose_types_are_strings_nobody_can_read_is_left_alone():
    @dataclass(frozen=True, kw_only=True)
    class Inner(lt.Method):
        field: "Nowhere" = "a"  # noqa: F821

    assert Inner(field="b").field == "b"


@pytest.mark.parametrize("row", [row for row in lt.methods() if row.package == "loratory"], ids=lambda row: row.name)
def test_a_field_whose_comment_states_a_limit_has_it(row):
    """'>= 1', '> 0', '>= 0' and 'in [0, 1)' behind a field are what its type refuses beyond."""
    cls = method_class(row.name)
    hints = typing.get_type_hints(cls, include_extras=True)
    docs = field_docs(cls)
    types = {">= 1": PositiveInt, "> 0": Positive, ">= 0": (Count, NotNegative), "in [0, 1)": Share, "in (0, 1]": PositiveShare, "in (0, 1)": InnerShare}  # fmt: skip
    for f in dataclasses.fields(cls):
        stated = [limit for limit in types if re.search(rf"(^|[ ,]){re.escape(limit)}", docs[f.name])]
        for limit in stated:
            kinds = types[limit] if isinstance(types[limit], tuple) else (types[limit],)
            assert any(hints[f.name] in (kind, kind | None) for kind in kinds), (f.name, limit, hints[f.name])
