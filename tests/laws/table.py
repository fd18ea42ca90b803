"""The method x site table: every registered method on every kind of layer that it serves."""

from importlib import import_module

import pytest

from loratory.methods import METHODS
from tests.laws.kinds import KINDS, Case, Row

TABLE: dict[str, Row] = {
    name: import_module(f"tests.methods.test_{cls.__module__.rsplit('.', 1)[-1]}").ROW
    for name, cls in METHODS.items()
    if cls.trains == "factors" and cls.acts_on == "layers"
}


CASES = [
    pytest.param(Case(kind, method, row), id=f"{label}-{kind_name}")
    for row in TABLE.values()
    for kind_name, kind in KINDS.items()
    if kind_name in row.served
    for label, method in row.made(kind.rank).items()
]
FIRST = [  # one instance of each method on each kind: for the slower laws
    pytest.param(Case(kind, next(iter(row.made(kind.rank).values())), row), id=f"{name}-{kind_name}")
    for name, row in TABLE.items()
    for kind_name, kind in KINDS.items()
    if kind_name in row.served
]
REFUSED = [
    pytest.param(Case(kind, next(iter(row.made(kind.rank).values())), row), id=f"{name}-{kind_name}")
    for name, row in TABLE.items()
    for kind_name, kind in KINDS.items()
    if kind_name not in row.served
]
