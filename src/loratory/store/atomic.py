"""Files and folders that are either whole or not there, whenever the process dies."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PENDING = ".pending"  # a file written in full, waiting to take its name


def write_files(folder: str | os.PathLike[str], files: Mapping[str, bytes]) -> None:
    """Write several files that belong together into a folder that may exist. The last one commits.

    All are first written and synced under pending names, the committing one before the others. Renaming it is the commit; the
    others follow. A process that dies before it leaves the old set; one that dies after it leaves pending files without the
    committing one among them, which `settle` (or the next call here) moves into place.
    Raises OSError, the old set untouched; FileExistsError if `folder` is a file.
    """
    path = Path(folder)
    if path.is_file():
        raise FileExistsError(f"'{path}' is a file; give a folder")
    fresh = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    *others, commit = files
    if not (path / (commit + PENDING)).exists():
        for name in others:
            settle(path, name)
    try:
        for name in [commit, *others]:
            _write_synced(path / (name + PENDING), files[name])
        os.replace(path / (commit + PENDING), path / commit)
    except BaseException:
        for name in [*others, commit]:
            (path / (name + PENDING)).unlink(missing_ok=True)
        if fresh:
            path.rmdir()
        raise
    for name in others:
        os.replace(path / (name + PENDING), path / name)
    _sync_folder(path)


def settle(folder: str | os.PathLike[str], name: str) -> None:
    """Finish the renaming of a pending file whose set was committed."""
    path = Path(folder)
    if (path / (name + PENDING)).exists():
        os.replace(path / (name + PENDING), path / name)


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes when it does not.

    Raises FileExistsError if `path` holds anything and overwrite is False.
    """
    target = Path(path)
    check_free(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        if target.exists():
            os.rename(target, old)
        os.rename(temporary, target)
        _sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_free(path: str | os.PathLike[str], *, overwrite: bool = False, out: str = "overwrite=True") -> None:
    """Refuse a path that exists and is not an empty folder."""
    target = Path(path)
    if target.is_file():
        raise FileExistsError(f"'{target}' is a file; give a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"the folder '{target}' is not empty; give another one, or pass {out}")


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync(path: Path) -> None:
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "posix":
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
