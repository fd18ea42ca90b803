"""The results file: one SQLite database to which is only ever added."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

SCHEMA = 1
APPLICATION = 0x4C4F5241  # "LORA": tells our files from other SQLite files
FILE = "results.sqlite"
TABLES = """
CREATE TABLE definitions (id INTEGER PRIMARY KEY, created REAL NOT NULL, body TEXT NOT NULL);
CREATE TABLE runs (id INTEGER PRIMARY KEY, created REAL NOT NULL, key TEXT NOT NULL, status TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE tests (id INTEGER PRIMARY KEY, created REAL NOT NULL, key TEXT NOT NULL, status TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE texts (id INTEGER PRIMARY KEY, created REAL NOT NULL, body TEXT NOT NULL);
CREATE INDEX runs_by_key ON runs (key);
CREATE INDEX tests_by_key ON tests (key);
"""


class Results:
    """Definitions, runs and measurements on test, in the order in which they came. The last row of a key counts.

    Raises ValueError for a file that is no results file, or one of another schema; nothing in it is changed then.
    """

    def __init__(self, folder: str | Path, *, new: bool = True) -> None:
        self.file = Path(folder) / FILE
        fresh = not self.file.exists()
        if fresh and not new:
            raise FileNotFoundError(f"'{folder}' holds no comparison ({FILE} is not there); give methods to start one")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if not fresh:
            check_schema(self.file)
            return
        pending = self.file.with_name(f".{FILE}.tmp")
        pending.unlink(missing_ok=True)
        connection = sqlite3.connect(pending)
        rules = "".join(
            f"CREATE TRIGGER no_{verb}_{table} BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, 'results are only added to'); END;"
            for table in ("definitions", "runs", "tests", "texts")
            for verb in ("UPDATE", "DELETE")
        )
        connection.executescript(
            f"PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {SCHEMA}; BEGIN; {TABLES} {rules} COMMIT;"
        )
        connection.close()
        pending.rename(self.file)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.file, timeout=30)) as connection, connection:  # all of it, or nothing
                yield connection
        except sqlite3.Error as error:
            raise unusable(self.file, error) from error

    def define(self, body: dict[str, Any]) -> None:
        """Add what the comparison is, where it is not what it was."""
        if self.definition() == json.loads(json.dumps(body)):
            return
        with self._open() as c:
            c.execute("INSERT INTO definitions (created, body) VALUES (?, ?)", (time.time(), json.dumps(body)))

    def definition(self) -> dict[str, Any] | None:
        with self._open() as c:
            row = c.execute("SELECT body FROM definitions ORDER BY id DESC LIMIT 1").fetchone()
        return json.loads(row[0]) if row else None

    def add_texts(self, texts: list[str]) -> None:
        """Add the inputs of the test rows."""
        with self._open() as c:
            c.execute("INSERT INTO texts (created, body) VALUES (?, ?)", (time.time(), json.dumps(texts)))

    def texts(self) -> list[str] | None:
        with self._open() as c:
            row = c.execute("SELECT body FROM texts ORDER BY id DESC LIMIT 1").fetchone()
        return json.loads(row[0]) if row else None

    def add_run(self, key: str, body: dict[str, Any]) -> None:
        self._add("runs", key, body)

    def add_test(self, key: str, body: dict[str, Any]) -> None:
        self._add("tests", key, body)

    def runs(self) -> dict[str, dict[str, Any]]:
        """The last attempt of each run."""
        return self._last("runs")

    def tests(self) -> dict[str, dict[str, Any]]:
        """The measurement of each run on test."""
        return self._last("tests")

    def _add(self, table: str, key: str, body: dict[str, Any]) -> None:
        with self._open() as c:
            values = (time.time(), key, body["status"], json.dumps(body))
            c.execute(f"INSERT INTO {table} (created, key, status, body) VALUES (?, ?, ?, ?)", values)

    def _last(self, table: str) -> dict[str, dict[str, Any]]:
        with self._open() as c:
            return {key: json.loads(body) for key, body in c.execute(f"SELECT key, body FROM {table} ORDER BY id")}


def unusable(file: Path, error: sqlite3.Error) -> sqlite3.Error:
    """The same error, with the file and the way out."""
    return type(error)(
        f"'{file}' could not be read or written ({error}); free disk space, end what else uses it, or put back a copy of it, and "
        "run the same command again"
    )


def check_schema(file: Path) -> None:
    """Raises ValueError for another file or schema. Opens it for reading only."""
    try:
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            schema = connection.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.Error as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:  # cut, locked, not to be opened
            raise unusable(file, error) from error
        raise ValueError(
            f"'{file}' is no results file of a comparison ({error}); name another folder with out"
        ) from None
    if application != APPLICATION:
        raise ValueError(f"'{file}' is a database of another program; name another folder with out")
    if schema != SCHEMA:
        raise ValueError(
            f"'{file}' has results of schema {schema}, but this version of loratory reads schema {SCHEMA}; use the version that "
            "wrote it, or start anew in another folder with out"
        )
