"""A bar for starts that take long: the layers of a model, decomposed or measured one after the other."""

import sys
import time
from collections.abc import Iterator, Sized
from typing import Protocol, TypeVar

T = TypeVar("T", covariant=True)

PATIENCE = 2.0  # seconds without a word


class Counted(Sized, Protocol[T]):
    def __iter__(self) -> Iterator[T]: ...


def shown(what: str, items: Counted[T]) -> Iterator[T]:
    """The items, with a bar on the terminal (elsewhere a line every ten seconds) once they take longer than PATIENCE."""
    start = said = time.monotonic()
    total, bar, task = len(items), None, None
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if bar is not None:
                bar.update(task, completed=done)
            elif now - start > PATIENCE and sys.stderr.isatty():
                bar, task = _bar(what, total, done)
            elif now - start > PATIENCE and (now - said > 10 or said == start):
                said = now
                print(f"{what}: {done} of {total} after {now - start:.0f} s", file=sys.stderr)
            yield item
    finally:
        if bar is not None:
            bar.stop()


def _bar(what: str, total: int, done: int):  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.start()
    return bar, bar.add_task("", total=total, completed=done)
