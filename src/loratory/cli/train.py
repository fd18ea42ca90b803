"""`loratory train`: settings from a YAML file and flags, then one run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loratory.cli.arguments import Group, asks_help, flags_of, help_text, read_flags
from loratory.train.settings import ADAPT_OPTIONS, GROUPS, TrainSettings, canonical, chosen, read_settings, types_of

USAGE = "loratory train [--config FILE.yaml] [--KEY VALUE ...] [--json]"


def run(arguments: Sequence[str]) -> int:
    words = list(arguments)
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    if asks_help(words):
        print(train_help([word for word in words if word not in ("-h", "--help")]))
        return 0
    settings = read_settings(read_keys(words))
    from loratory.cli.quiet import quiet
    from loratory.train.run import announces, train

    quiet()
    stream = sys.stderr if as_json else sys.stdout
    result = train(settings, say=lambda text: print(text, file=stream, flush=True))
    if not announces():
        return 130 if result.stopped == "interrupted" else 0
    if as_json:
        import json

        print(json.dumps(asdict(result)))
    elif result.stopped != "dry run":
        print(result)
    return 130 if result.stopped == "interrupted" else 0


def read_keys(words: Sequence[str]) -> dict[str, Any]:
    """Settings from the YAML file of --config, with the flags over them."""
    flags, others = read_flags(words, first_look(words))
    if others:
        hint = (
            f"; did you mean --config {others[0]}?"
            if others[0].endswith((".yaml", ".yml"))
            else "; settings are flags: --KEY VALUE"
        )
        raise ValueError(f"'{others[0]}' is not expected here{hint}")
    file = flags.pop("config", None)
    return {**(canonical(read_yaml(file)) if file is not None else {}), **canonical(flags)}


def first_look(words: Sequence[str]) -> dict[str, Any]:
    """Types of all keys, those of the method and task that the words or their YAML file choose included."""
    flags, _ = read_flags(words, {"config": str})
    flat = canonical({key: value for key, value in flags.items() if key != "config"})
    if isinstance(flags.get("config"), str):
        flat = {**canonical(read_yaml(flags["config"])), **flat}
    names: dict[str, Any] = {key: flat[key] for key in ("method", "task") if key in flat}
    hints = types_of(*chosen(names))
    from loratory.runtime.where import ALIASES
    from loratory.train.settings import TRAIN_ALIASES

    return {
        **hints,
        "config": str,
        **{alias: hints[name] for alias, name in {**ALIASES, **TRAIN_ALIASES}.items() if name in hints},
    }


def read_yaml(file: str) -> dict[str, Any]:
    """The keys of a recipe."""
    import yaml

    try:
        with open(file, encoding="utf-8") as stream:
            found = yaml.safe_load(stream)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file '{file}'; `loratory init {file}` writes one to start from") from None
    except yaml.YAMLError as e:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(e).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(
            f"{file} holds {type(found).__name__}, but must hold lines `key: value`; `loratory init` shows how"
        )
    return found


def train_help(words: Sequence[str]) -> str:
    """The help, with the flags of the method and task that the other words choose."""
    flags, _ = read_flags(words, {})
    names = {key: value for key, value in canonical(flags).items() if key in ("method", "task")}
    epilog = (
        "Other names people know work too (r, lora_alpha, target_modules, modules_to_save, rank_pattern, ...), with - or _. "
        "A YAML file holds the same keys; flags win over it. `--method dora --task tagging --help` shows the flags of others. "
        "--json prints the result as JSON."
    )
    return help_text(USAGE, "Train an adapter.", groups(*chosen(names)), epilog)


def groups(method: Any, task: type) -> list[Group]:
    """All keys of a run with this method and task, in groups."""
    out: list[Group] = []
    for flag in flags_of(TrainSettings, skip=("method_options", "task_options", "training_options")):
        if flag[0] in GROUPS:
            out.append((GROUPS[flag[0]], []))
        out[-1][1].append(flag)
    taken = {flag[0] for _, flags in out for flag in flags}
    if hasattr(method, "flags"):  # a tuner of PEFT
        of_method: Group = (f"Method {method.__name__} of PEFT", method.flags())
    else:
        of_method = (f"Method {method.__name__}", [flag for flag in flags_of(method) if flag[0] not in taken])
        of_method[1].extend((name, kind, default, doc) for name, (kind, default, doc) in ADAPT_OPTIONS.items())
    of_task: Group = (f"Task {getattr(task, 'name', task.__name__)}", flags_of(task))
    return [*out[:2], of_task, out[2], of_method, *out[3:]]
