"""The output folder of a run: fresh, emptied, or taken up again."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loratory.train.settings import TrainSettings

SETTINGS = "settings.yaml"
OURS = (
    "adapter",
    SETTINGS,
    "before.json",
    "metrics.jsonl",
    "result.json",
    "runs",
)  # beside checkpoint-* and hidden temporary ones


def check_folder(settings: TrainSettings) -> Path:
    """The output folder, after checking that the run may use it; nothing is written.

    Raises FileExistsError if it holds a run and neither resume nor overwrite was given, or anything that no run wrote.
    """
    output = Path(settings.output_dir)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output_dir '{output}' is a file; name a folder")
    found = [path.name for path in sorted(output.iterdir()) if not unfinished(path)] if output.exists() else []
    begun = set(found) - {SETTINGS, "before.json"}  # a run that came no further than these is no loss
    if begun and not settings.resume and not settings.overwrite and not settings.dry_run:
        raise FileExistsError(
            f"output_dir '{output}' is not empty (it holds {min(begun)}); go on with --resume, empty it with --overwrite, or name "
            "another --output_dir"
        )
    if settings.overwrite and (foreign := [name for name in found if not is_ours(name)]):
        raise FileExistsError(
            f"output_dir '{output}' holds {foreign[0]}, which no run wrote, so it is not emptied; name another"
        )
    return output


def begin_folder(settings: TrainSettings, output: Path, say: Callable[[str], None]) -> None:
    """Make or empty the folder, remove what a killed run left, and write the settings into it."""
    import yaml

    output.mkdir(parents=True, exist_ok=True)
    if not settings.resume:
        for path in sorted(output.iterdir()):
            if is_ours(path.name):
                remove(path)
    clean(output, say)
    if not (output / SETTINGS).exists():
        kept = {key: value for key, value in settings.flat().items() if key not in ("resume", "overwrite")}
        write_text(output / SETTINGS, yaml.safe_dump(kept, sort_keys=False))


def unfinished(path: Path) -> bool:
    """Whether this is what a killed save or deletion left."""
    return path.name.startswith(".") and any(
        mark in path.name for mark in (".checkpoint-", ".adapter", ".deleted", ".tmp")
    )


def clean(output: Path, say: Callable[[str], None]) -> None:
    """Remove what a killed save or deletion left."""
    for path in sorted(output.iterdir()):
        if (match := re.fullmatch(r"\.(checkpoint-\d+)\.old-\d+", path.name)) and not (output / match[1]).exists():
            path.rename(output / match[1])  # killed between moving the old one aside and the new one in
        elif unfinished(path):
            remove(path)
            say(f"removed {path.name}, left by a run that was killed while saving")


def is_ours(name: str) -> bool:
    return name in OURS or name.startswith("checkpoint-") or unfinished(Path(name))


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_text(file: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the new one."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=1) + "\n")


def refuse_changes(
    then: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path, say: Callable[[str], None]
) -> None:
    """Raises ValueError if a run would be resumed with other settings or data; other versions are only said."""
    old, new = then["settings"], now["settings"]
    changed = [
        f"{key} was {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    for split in now["data"]:
        if then["data"][split] != now["data"][split]:
            rows = [each["data"][split]["rows"] for each in (then, now)]
            changed.append(f"the {split} rows are others ({rows[0]} then, {rows[1]} now)")
    if changed:
        raise ValueError(
            f"{checkpoint} was made by another run: {'; '.join(changed)}; resume with what it was started with "
            f"({checkpoint.parent / SETTINGS} holds it), or start anew in another output_dir"
        )
    if then["versions"] != now["versions"]:
        others = [
            f"{key} {value} then, {now['versions'].get(key)} now"
            for key, value in then["versions"].items()
            if value != now["versions"].get(key)
        ]
        say(f"other versions than at the start ({', '.join(others)}): the result may differ in the last bits")


def command_to_resume(settings: TrainSettings) -> str:
    """The command that goes on with a run."""
    return f"loratory train --config {shlex.quote(str(Path(settings.output_dir) / SETTINGS))} --resume"
