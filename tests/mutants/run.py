"""Plant each wrong formula into a copy of the source and see that the tests fail: `make mutants`, or run.py with words to choose some.

Exits 1 if a mutant survives, if its text is not found exactly once, or if the tests fail without any mutant.
"""

import contextlib
import io
import multiprocessing
import multiprocessing.pool
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

if __package__:
    from tests.mutants.planted import PLANTED, Mutant
else:
    from planted import PLANTED, Mutant

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
CAUGHT, PASSED = 1, 0  # pytest's exit codes


def mutated(mutant: Mutant, source: Path = SOURCE) -> str:
    """The file with the wrong formula, or an error where its text is not there exactly once."""
    text = (source / "loratory" / mutant.file).read_text(encoding="utf-8")
    for right, wrong in mutant.edits:
        if text.count(right) != 1:
            raise ValueError(
                f"mutant '{mutant.wrong}': {mutant.file} holds {right!r} {text.count(right)} times, not once"
            )
        text = text.replace(right, wrong)
    return text


def run_tests(source: Path, tests: Iterable[str]) -> tuple[int, str]:
    """Run tests against a source folder, in a process that has not imported loratory; pytest's exit code and the first failure."""
    import pytest

    assert "loratory" not in sys.modules
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(source))
    os.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "--show-capture=no", *tests]
        )
    ran = sys.modules.get("loratory")
    if ran is not None and ran.__file__ is not None and not Path(ran.__file__).is_relative_to(source):
        raise RuntimeError(f"the tests ran {ran.__file__} instead of the copy in {source}")
    failed = [line for line in printed.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return int(code), failed[0].split(" - ")[0].split("::", 1)[-1] if failed else ""


def run_plain(test: str) -> tuple[int, str]:
    return run_tests(SOURCE, [test])


def try_mutant(mutant: Mutant) -> tuple[Mutant, int, str, float]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve() / "src"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "loratory" / mutant.file).write_text(mutated(mutant), encoding="utf-8")
        code, failure = run_tests(copy, mutant.tests)
    return mutant, code, failure, time.monotonic() - start


def fresh_processes() -> multiprocessing.pool.Pool:
    """One process for each task, forked from this one, which has imported torch but never loratory."""
    import torch  # noqa: F401
    import transformers.pytorch_utils  # noqa: F401

    return multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1)


def main(words: list[str]) -> int:
    chosen = [m for m in PLANTED if not words or any(w in f"{m.file} {m.wrong}" for w in words)]
    for mutant in chosen:
        mutated(mutant)
    tests = sorted({test for mutant in chosen for test in mutant.tests})
    survived = []
    with fresh_processes() as pool:
        for test, (code, failure) in zip(tests, pool.imap(run_plain, tests), strict=True):
            if code != PASSED:
                print(f"{test} fails without any mutant ({failure or f'exit code {code}'}); repair it first")
                return 1
        print(f"{len(tests)} groups of tests pass without a mutant; planting {len(chosen)}", flush=True)
        for mutant, code, failure, seconds in pool.imap(try_mutant, chosen):
            verdict = {CAUGHT: "caught", PASSED: "SURVIVED"}.get(code, f"NOT RUN (exit code {code})")
            print(f"{verdict:9} {seconds:5.1f} s  {mutant.file:24} {mutant.wrong:44} {failure}", flush=True)
            if code != CAUGHT:
                survived.append(mutant)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as e:
        print(f"error: {e}")
        sys.exit(1)
