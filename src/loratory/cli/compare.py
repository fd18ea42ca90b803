"""`loratory compare`: methods on one task, under one budget, with learning rates chosen on dev and a test used once."""

from __future__ import annotations

import json
import shlex
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratory.cli.arguments import asks_help, flags_of, help_text, read_flags
from loratory.cli.train import read_yaml
from loratory.compare.engine import finish, read_comparison, rows, run_comparison
from loratory.compare.settings import OWN, CompareSettings, presets, read_compare
from loratory.train.settings import canonical, types_of

USAGE = "loratory compare [--preset NAME] [--config FILE.yaml] [--methods A,B,...] [--KEY VALUE ...] [--json]\n       loratory compare DIR   (builds the report of a comparison again)"


def run(arguments: Sequence[str]) -> int:
    words = list(arguments)
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if asks_help(words):
        print(compare_help())
        return 0
    from loratory.cli.quiet import quiet

    quiet()
    stream = sys.stderr if as_json else sys.stdout

    def say(text: str) -> None:
        print(text, file=stream, flush=True)

    keys, folder = read_words(words)
    if folder is not None:
        comparison = finish(Path(folder), say)
    else:
        command = shlex.join(["loratory", "compare", *arguments])
        comparison = run_comparison(read_compare(keys), say=say, command=command)
    if as_json:
        print(json.dumps({"warnings": comparison.warnings, "chosen": comparison.chosen, "runs": rows(comparison)}))
    return 0 if all(method in comparison.chosen for method in comparison.methods) else 1


def read_words(words: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """Settings from the YAML file of --config with the flags over them; or the folder whose report is asked for."""
    own = typing.get_type_hints(CompareSettings)
    kinds: dict[str, Any] = {name: own[name] for name in OWN if own[name] is not Any} | {
        "config": str,
        "methods": list[str],
        "seeds": list[str],
    }
    flags, others = read_flags(words, {**types_of_training(words), **kinds})
    flags = {name.replace("-", "_"): value for name, value in flags.items()}
    if others and not flags and len(others) == 1:
        read_comparison(others[0])
        return {}, others[0]
    if others:
        hint = (
            "give a folder alone to build its report again"
            if Path(others[0]).is_dir()
            else "settings are flags: --KEY VALUE"
        )
        raise ValueError(f"'{others[0]}' is not expected here; {hint}")
    file = flags.pop("config", None)
    for name in ("methods", "seeds"):
        if isinstance(flags.get(name), list):
            flags[name] = ",".join(flags[name])
    recipe = read_yaml(str(file)) if file is not None else {}
    shared = {key: value for key, value in recipe.items() if key.replace("-", "_") not in OWN}
    rest = {key: value for key, value in flags.items() if key not in OWN}
    merged = {key.replace("-", "_"): value for key, value in recipe.items() if key.replace("-", "_") in OWN}
    return {**canonical(shared), **canonical(rest), **merged, **{k: v for k, v in flags.items() if k in OWN}}, None


def types_of_training(words: Sequence[str]) -> dict[str, Any]:
    """Types of the training settings, those of the named task included."""
    from loratory.methods.registry import method_class
    from loratory.tasks import TASKS
    from loratory.train.settings import chosen

    flags, _ = read_flags(words, {})
    task = str(flags.get("task", "chat"))
    _, cls = chosen({"task": task}) if task in TASKS else (None, TASKS["chat"])
    return {name: kind for name, kind in types_of(method_class("lora"), cls).items() if name not in OWN}


def compare_help() -> str:
    flags = list(flags_of(CompareSettings, skip=("shared",)))
    epilog = (
        f"Presets: {', '.join(presets())}. Every training setting that all runs share is a flag too (--base, --task, --train, --dev, "
        "--test, --max_steps, ...: `loratory train --help`). A YAML file holds the same keys; there, methods may be a table "
        "{label: {method: lora, rank: 16, rates: [1e-3]}}. The same command again goes on where it stopped, and new methods, seeds or "
        "rates are added to what is there. --json prints one row for each run."
    )
    return help_text(USAGE, (CompareSettings.__doc__ or "").splitlines()[0], [("flags", flags)], epilog)
