"""Flags of a verb, from the fields of a dataclass: one definition for names, types, defaults and help."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from loratory.train.settings import convert, default_of, field_docs, is_list

Settings = TypeVar("Settings")
Group = tuple[str, list[tuple[str, Any, Any, str]]]  # title, and (name, type, default, help) of each flag


def read_flags(arguments: Sequence[str], kinds: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """({flag as it was spelled: its text, list of texts, or truth value}, words that belong to no flag).

    kinds: type of each known flag; `-` and `_` are the same. A flag of an unknown name takes the word after it, if there is one.
    """
    flags: dict[str, Any] = {}
    others: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if word.startswith("-") and not is_value(word):
                raise ValueError(f"'{word}' is no flag; flags are written out, with two dashes: `--help` lists them")
            others.append(word)
            continue
        flag, equals, text = word[2:].partition("=")
        name = flag.replace("-", "_")
        kind = kinds.get(name)
        if kind is None and name.startswith("no_") and kinds.get(name[3:]) is bool:
            flags[name[3:]] = False
        elif equals:
            flags[flag] = text
        elif kind is bool:
            flags[flag] = words.pop(0) if words and words[0].lower() in ("true", "false") else True
        elif not words or not is_value(words[0]):
            if kind is not None:
                raise ValueError(f"--{flag} needs a value; `--help` says which")
            flags[flag] = True
        elif is_list(kind):
            values = [words.pop(0)]
            while words and is_value(words[0]):
                values.append(words.pop(0))
            flags[flag] = values if len(values) > 1 else values[0]
        else:
            flags[flag] = words.pop(0)
    return flags, others


def is_value(word: str) -> bool:
    """Whether a word is a value, not a flag: -1 is a value."""
    return not word.startswith("-") or word == "-" or word[1:2].isdigit()


def parse(cls: type[Settings], arguments: Sequence[str], *, positional: Sequence[str] = (), rest: str = "") -> Settings:
    """An object of a verb's dataclass from its flags. `positional`: fields given by place; `rest`: field that takes all others."""
    hints = typing.get_type_hints(cls)
    flags, words = read_flags(arguments, {_flag(name): kind for name, kind in hints.items()})
    spelled = {_flag(name): name for name in hints}
    values = {spelled.get(flag.replace("-", "_"), flag.replace("-", "_")): value for flag, value in flags.items()}
    for name in values:
        if name not in hints:
            near = get_close_matches(name, hints, n=3, cutoff=0.0)
            raise ValueError(
                f"there is no flag '--{name}'; nearest: {', '.join('--' + n for n in near)}; `--help` lists all"
            )
    for name in positional:
        if words and name not in values:
            values[name] = words.pop(0)
    if rest and rest in values and words:
        raise ValueError(f"'{words[0]}' and --{_flag(rest)} both give {rest}; use one of the two")
    if rest:
        values.setdefault(rest, words)
    elif words:
        raise ValueError(f"'{words[0]}' is not expected here; `--help` shows how to call this verb")
    for f in fields(cls):  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
            raise ValueError(f"{f.name} is missing: {field_docs(cls)[f.name]}; `--help` shows how to call this verb")
    return cls(**convert(values, hints))


def asks_help(arguments: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in arguments)


def flags_of(cls: type, skip: Sequence[str] = ()) -> list[tuple[str, Any, Any, str]]:
    """Name, type, default and help of each field."""
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    return [(_flag(f.name), hints[f.name], default_of(f), docs[f.name]) for f in fields(cls) if f.name not in skip]


def _flag(field: str) -> str:
    """The flag of a field: a word that Python keeps for itself stands there with a `_` behind it."""
    return field.rstrip("_")


def help_text(usage: str, description: str, groups: Sequence[Group], epilog: str = "") -> str:
    """The help of a verb."""
    import argparse
    import shutil

    width = min(116, shutil.get_terminal_size((100, 24)).columns)

    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=36, width=width)

    parser = argparse.ArgumentParser(
        usage=usage, description=description, epilog=epilog, add_help=False, formatter_class=formatter
    )
    for title, flags in groups:
        group = parser.add_argument_group(title)
        for name, kind, default, doc in flags:
            shown = "" if default in (None, (), [], False, "") else f" [{default}]"
            text = (doc + shown).replace("%", "%%")
            if kind is bool:
                group.add_argument(f"--{name}", action="store_true", help=text)
            else:
                group.add_argument(f"--{name}", metavar=metavar(kind), help=text)
    return parser.format_help()


def metavar(kind: Any) -> str:
    """A short word for what a flag takes."""
    inner = [each for each in typing.get_args(kind) if each is not type(None)]
    literal = next((each for each in (kind, *inner) if typing.get_origin(each) is typing.Literal), None)
    if literal is not None:
        return "{" + ",".join(map(str, typing.get_args(literal))) + "}"
    if is_list(kind):
        return "A,B,..."
    words = {str: "TEXT", int: "N", float: "X", bool: "true|false"}
    return words.get(kind) or (words.get(inner[0], "TABLE") if inner else "VALUE")


def verb_help(cls: type, usage: str, epilog: str = "") -> str:
    """The help of a verb whose flags are one dataclass."""
    title = (cls.__doc__ or "").strip().splitlines()[0]
    return help_text(usage, title, [("flags", flags_of(cls))], epilog)
