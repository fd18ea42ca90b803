"""Reading data: files, folders of files, and `datasets` names, into rows that remember where they stood."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratory.tasks.pictures import read_folders, read_npz
from loratory.tasks.rows import Row

SPLITS = {"train": ("train", "training"), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}
DEV_SHARE, DEV_MOST = 0.05, 1000


@dataclass(frozen=True)
class Data:
    """Rows of each split, and sentences for the user about how they came about."""

    train: list[Row]
    dev: list[Row]
    test: list[Row]
    notes: tuple[str, ...] = ()


def read_data(
    source: str | Path,
    *,
    dev: str | Path | None = None,
    test: str | Path | None = None,
    text_by: str = "document",
    seed: int = 0,
) -> Data:
    """All splits of a source; dev and test may come from sources of their own.

    Without a dev split, 5 % of the training rows (at least 1, at most 1000; of one long text, its end) are held out.
    """
    splits = _read(source, text_by)
    notes = []
    for name, other in (("dev", dev), ("test", test)):
        if other is not None:
            splits[name] = _choose(_read(other, text_by), (name, "train"), other)
    train = _choose(splits, ("train",), source)
    if "dev" not in splits:
        train, splits["dev"], note = _hold_out(train, str(source), seed)
        notes.append(note)
    keys = {json.dumps(row, sort_keys=True, default=str) for row in train}
    for name in ("dev", "test"):
        both = [row for row in splits.get(name, []) if json.dumps(row, sort_keys=True, default=str) in keys]
        if both:
            count = f"{len(both)} of {len(splits[name])} {name} rows"
            notes.append(f"{count} also stand in train, so {name} metrics flatter (first: {both[0].origin})")
    return Data(train, splits["dev"], splits.get("test", []), tuple(notes))


def read_rows(source: str | Path, *, split: str = "train", text_by: str = "document") -> list[Row]:
    """The rows of a file, or of one split of a folder or data set."""
    return _choose(_read(source, text_by), ("train" if Path(source).is_file() else split,), source)


def _choose(splits: dict[str, list[Row]], names: tuple[str, ...], source: str | Path) -> list[Row]:
    for name in names:
        if name in splits:
            return splits[name]
    raise ValueError(f"'{source}' has no {names[0]} split (found: {', '.join(splits) or 'none'}); choose one of these")


def _read(source: str | Path, text_by: str) -> dict[str, list[Row]]:
    if text_by not in ("document", "line"):
        raise ValueError(f"text_by is '{text_by}', but must be 'document' (a file is one) or 'line'")
    path = Path(source)
    if path.is_file():
        return {"train": _read_file(path, text_by)}
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _read_hub(str(source), saved=True)
        return _read_folder(path, text_by)
    local = path.suffix in READERS or path.is_absolute() or str(source).startswith((".", "~"))
    if local or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir()):
        raise FileNotFoundError(f"data '{source}' is no file or folder (looked in {Path.cwd()}); check the path")
    return _read_hub(str(source), saved=False)


def _read_folder(folder: Path, text_by: str) -> dict[str, list[Row]]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in READERS)
    splits: dict[str, list[Row]] = {}
    for split, stems in SPLITS.items():
        mine = [path for path in files if path.stem in stems or path.stem.startswith(tuple(f"{s}-0" for s in stems))]
        if len({path.suffix for path in mine}) > 1 or (len(mine) > 1 and any(path.stem in stems for path in mine)):
            names = ", ".join(path.name for path in mine)
            raise ValueError(f"folder '{folder}' has more than one {split} file ({names}); keep one of them")
        if mine:
            splits[split] = [row for path in mine for row in _read_file(path, text_by)]
    if not splits and len(files) == 1:
        splits["train"] = _read_file(files[0], text_by)
    if not splits and not files:
        splits = read_folders(folder, SPLITS)
    if not splits:
        names = ", ".join(path.name for path in sorted(folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"folder '{folder}' has no train, dev or test file (found: {names}); known endings: {', '.join(READERS)}"
        )
    return splits


def _read_hub(name: str, *, saved: bool) -> dict[str, list[Row]]:
    import datasets

    try:
        if saved:
            found = datasets.load_from_disk(name)
        else:
            path, _, config = name.partition(":")
            found = datasets.load_dataset(path, config or None)
    except Exception as error:  # datasets raises many kinds, from the network's to its own
        where = "folder saved by datasets" if saved else "file, a folder or a data set on the hub (name or name:config)"
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise FileNotFoundError(f"data '{name}' could not be read as a {where}; {cause}") from error
    parts = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
    splits = {}
    for split, stems in SPLITS.items():
        part = next((str(stem) for stem in parts if str(stem) in stems), None)
        if part is not None:
            splits[split] = _hub_rows(parts[part], f"{name}[{part}]")
    return splits


def _hub_rows(part: Any, name: str) -> list[Row]:
    """Rows of a datasets.Dataset; numbers that stand for class names become the names."""
    classes = {}
    for column, feature in part.features.items():
        inner = getattr(feature, "feature", feature)  # of a list of classes, e.g. ner_tags
        if hasattr(inner, "names"):
            classes[column] = list(inner.names)

    def named(column: str, value: Any) -> Any:
        if isinstance(value, list):
            return [named(column, each) for each in value]
        return classes[column][value] if isinstance(value, int) and value >= 0 else value

    rows = [
        Row({c: named(c, v) if c in classes else v for c, v in row.items()}, f"{name} row {number}")
        for number, row in enumerate(part, 1)
    ]
    if not rows:
        raise ValueError(f"{name} has no rows; give it some")
    return rows


def _hold_out(train: list[Row], source: str, seed: int) -> tuple[list[Row], list[Row], str]:
    count = min(DEV_MOST, max(1, round(DEV_SHARE * len(train))))
    if len(train) == 1 and list(train[0]) == ["text"]:
        text, where = train[0]["text"], train[0].origin
        cut = text.rfind("\n", 0, round((1 - DEV_SHARE) * len(text))) + 1
        if cut and text[:cut].strip() and text[cut:].strip():
            note = f"dev: the last {len(text) - cut} of {len(text)} characters of {source}, which has no dev file"
            return [Row({"text": text[:cut]}, where)], [Row({"text": text[cut:]}, f"{where} (its end)")], note
    if len(train) < 2:
        raise ValueError(f"'{source}' has 1 row, too few to hold out a dev split; add rows or name dev data")
    chosen = set(random.Random(seed).sample(range(len(train)), count))
    dev = [row for index, row in enumerate(train) if index in chosen]
    rest = [row for index, row in enumerate(train) if index not in chosen]
    return rest, dev, f"dev: {count} of {len(train)} training rows held out (seed {seed}), as {source} has no dev split"


# -- one reader a format -----------------------------------------------------------------------------------------------


def _read_file(path: Path, text_by: str) -> list[Row]:
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a file ending in '{path.suffix}' cannot be read; known: {', '.join(READERS)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes); give it some rows")
    try:
        rows = list(_read_text(path, text_by) if READERS[path.suffix] is _read_text else READERS[path.suffix](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    if not rows:
        raise ValueError(f"{path} has no rows; give it some")
    return rows


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise TypeError(f"{where}: {value!r:.60} is {type(value).__name__}, but each row must be an object {{...}}")
    return Row(value, where)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    value = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path} row {number}: not JSON ({error.msg} at column {error.colno}): {line.strip():.60}"
                    ) from None
                yield _object(value, f"{path} row {number}")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno}: not JSON ({error.msg}); one object a line is .jsonl") from None
    values = value.get("data") if isinstance(value, dict) else value
    if not isinstance(values, list):
        raise TypeError(f"{path} holds {type(value).__name__}, but a list of rows (or one under 'data') is expected")
    for number, each in enumerate(values, 1):
        yield _object(each, f"{path} row {number}")


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            names = next(reader)
            if len(set(names)) < len(names) or "" in names:
                raise ValueError(f"{path} line 1: column names must be there and differ (found: {', '.join(names)})")
            for number, values in enumerate((values for values in reader if values), 1):
                where = f"{path} row {number} (line {reader.line_num})"
                if len(values) != len(names):
                    raise ValueError(f"{where}: {len(values)} values, but {len(names)} columns ({', '.join(names)})")
                yield Row(dict(zip(names, values, strict=True)), where)
        except csv.Error as error:
            raise ValueError(f"{path} line {reader.line_num}: not a table ({error}); check its quotes") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file ({str(error).splitlines()[0]})") from None
    for number, each in enumerate(values, 1):
        yield Row(each, f"{path} row {number}")


def _read_conll(path: Path) -> Iterator[Row]:
    """A word a line: the word first, its tag last; an empty line ends a sentence, which is a row."""
    with path.open(encoding="utf-8-sig") as stream:
        lines = [line.rstrip("\n") for line in stream]
    separator = "\t" if any("\t" in line for line in lines) else None
    words: list[list[str]] = []
    columns, number = 0, 0
    for index, line in enumerate([*lines, ""], 1):
        if line.strip() and not line.startswith("-DOCSTART-"):
            cells = line.split(separator)
            columns = columns or len(cells)
            if len(cells) != columns or columns < 2 or not cells[0] or not cells[-1]:
                expected = f"{max(columns, 2)} columns, the word first and its tag last"
                raise ValueError(f"{path} row {number + 1} (line {index}): {line!r:.60} has not {expected}")
            words.append(cells)
        elif words:
            number += 1
            where = f"{path} row {number} (line {index - len(words)})"
            yield Row({"tokens": [cells[0] for cells in words], "tags": [cells[-1] for cells in words]}, where)
            words = []


def _read_text(path: Path, text_by: str = "document") -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if text_by == "document":
        yield from [Row({"text": text}, str(path))] if text.strip() else []
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield Row({"text": line}, f"{path} row {number}")


READERS: dict[str, Callable[..., Iterator[Row]]] = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet,
    ".conll": _read_conll, ".bio": _read_conll, ".txt": _read_text, ".npz": read_npz,
}  # fmt: skip
