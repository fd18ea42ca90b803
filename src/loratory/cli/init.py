"""`loratory init`: a commented recipe."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory init [FILE] [--method lora] [--task chat]"
CHOSEN = {"base": "smollm2-135m", "train": "data/train.jsonl"}  # settings without a default


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """Write a commented recipe for `loratory train --config`."""

    file: str = "recipe.yaml"  # where to write it; - for the terminal
    method: str = "lora"  # see `loratory methods`
    task: str = "chat"  # chat, text, classification, tagging, seq2seq or image
    overwrite: bool = False  # replace the file if it exists


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(InitSettings, USAGE))
        return 0
    settings = parse(InitSettings, arguments, positional=("file",))
    text = recipe(settings.method, settings.task)
    if settings.file == "-":
        print(text, end="")
        return 0
    if os.path.exists(settings.file) and not settings.overwrite:
        raise FileExistsError(f"'{settings.file}' exists; name another file, or give --overwrite")
    with open(settings.file, "w", encoding="utf-8") as stream:
        stream.write(text)
    print(f"wrote {settings.file}; start with: loratory train --config {settings.file}")
    return 0


def recipe(method: str, task: str) -> str:
    """Every setting with its default and what it is; only what a run is likely to change is not commented out."""
    from loratory.cli.train import groups
    from loratory.train.settings import chosen

    shown = {
        "task",
        "method",
        "where",
        "output_dir",
        "learning_rate",
        "num_train_epochs",
        "per_device_train_batch_size",
        "rank",
        "alpha",
    }
    given = {**CHOSEN, "method": method, "task": task}
    lines = ["# A recipe for `loratory train --config THIS_FILE`. Every key is also a flag, which wins over the file."]
    for title, flags in groups(*chosen(given)):
        lines += ["", *textwrap.wrap(f"{title}", 110, initial_indent="# -- ", subsequent_indent="#    ")]
        for name, _, default, doc in flags:
            value = given.get(name, default)
            entry = f"{name}: {yaml_value(value)}"
            lines.append(f"{entry if name in shown or name in CHOSEN else '# ' + entry}{'  # ' + doc if doc else ''}")
    return "\n".join(lines) + "\n"


def yaml_value(value: Any) -> str:
    """A value as YAML on one line."""
    import yaml

    plain = list(value) if isinstance(value, tuple) else value
    return (
        str(yaml.safe_dump(plain, default_flow_style=True, width=1000)).removesuffix("\n").removesuffix("...").strip()
    )
