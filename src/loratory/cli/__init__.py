"""The command line: `loratory VERB ...`. One file a verb; a verb is imported when it is called."""

from __future__ import annotations

import errno
import importlib
import os
import sqlite3
import sys
import traceback
from collections.abc import Sequence

VERBS = {  # verb -> what it does; the module of that name has `run(arguments) -> exit code`
    "train": "train an adapter on your data",
    "plan": "say what a run will need, before it runs",
    "init": "write a commented recipe (YAML) to start from",
    "compare": "compare methods on one task, fairly",
    "claims": "list and check what the papers claim",
    "eval": "measure an adapter on data",
    "generate": "answer prompts with an adapter",
    "chat": "talk with an adapted model",
    "merge": "write base and adapter as one plain model",
    "export": "write an adapter in PEFT's format, or merged",
    "push": "push an adapter and its card to the hub",
    "inspect": "show what an adapter file holds",
    "methods": "list the methods",
    "demo": "see it work on real data",
}
FAILURES = (FloatingPointError, MemoryError, sqlite3.Error)
MISTAKES = (ValueError, TypeError, RuntimeError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0, 1 (it failed), 2 (called wrongly) or 130 (interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(f"loratory {version('loratory')}")
        return 0
    try:
        return run_verb(words[0], words[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        sys.stderr.close()
        return 0
    except Exception as e:
        expected = isinstance(e, (*MISTAKES, *FAILURES)) and not isinstance(e, NotImplementedError)
        if show_traceback or not expected:
            traceback.print_exc()
        number = os.environ.get("RANK", "0")  # of a process that torchrun or accelerate started
        print(f"error{f' in process {number}' if number != '0' else ''}: {one_line(e)}", file=sys.stderr)
        failed = not expected or isinstance(e, FAILURES) or getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        return 1 if failed else 2


def run_verb(verb: str, arguments: list[str]) -> int:
    if verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(verb, VERBS, n=3, cutoff=0.0)
        raise ValueError(f"there is no verb '{verb}'; nearest: {', '.join(near)}; `loratory` alone lists all")
    code = importlib.import_module(f"loratory.cli.{verb}").run(arguments)
    return int(code or 0)


def overview() -> str:
    """What `loratory` alone shows."""
    lines = ["usage: loratory VERB [...]", "", *(f"  {verb:10}{text}" for verb, text in VERBS.items()), ""]
    return "\n".join(
        [*lines, "`loratory VERB --help` shows a verb's flags; --traceback shows where an error comes from."]
    )


def one_line(error: BaseException) -> str:
    """An error as one line of text."""
    text = error.strerror or str(error) if isinstance(error, OSError) and error.filename is None else str(error)
    return " ".join(text.split()) or type(error).__name__
