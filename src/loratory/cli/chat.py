"""`loratory chat`: talk with an adapted model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory chat ADAPTER [--system TEXT]"


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """Talk with an adapted model. /reset forgets the conversation, /exit ends."""

    adapter: str  # adapter folder, output_dir of a run, or hub name
    system: str | None = None  # system message; default: the one it was trained with
    max_new_tokens: int = 256  # length of an answer at most
    temperature: float = 0.0  # 0: the likeliest word each time; higher: more chance
    top_p: float = 1.0  # draw only among the likeliest words of this total probability
    seed: int = 0  # of the draws
    base: str | None = None  # default: the one recorded in the adapter
    dtype: str | None = None  # float32, bfloat16, float16; default: as trained
    device: str = "auto"  # cpu, cuda, mps


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(ChatSettings, USAGE))
        return 0
    settings = parse(ChatSettings, arguments, positional=("adapter",))
    import torch

    from loratory.cli.generate import sampling, stream_answer
    from loratory.cli.quiet import quiet
    from loratory.tasks.chat import Chat
    from loratory.train.opened import open_adapter

    options = sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
    quiet()
    opened = open_adapter(settings.adapter, settings.base, dtype=settings.dtype, device=settings.device)
    if opened.task is not None and not isinstance(opened.task, Chat):
        raise ValueError(
            f"'{settings.adapter}' was trained for task '{opened.task.name}', which holds no conversation; use `loratory generate`"
        )
    task = opened.task or Chat()
    torch.manual_seed(settings.seed)
    system = settings.system or task.system
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    print(f"{settings.adapter} on {opened.base}; /reset forgets the conversation, /exit ends", flush=True)
    while (line := read_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            messages = list(opening)
            print("(forgotten)", flush=True)
            continue
        if line.startswith("/"):
            print("(commands: /reset, /exit)", flush=True)
            continue
        if not line:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            answer = stream_answer(opened, list(task.prompt_ids(asked, opened.tokenizer)), options)
        except ValueError as e:  # the conversation has outgrown the model
            print(f"({e}; or /reset)", flush=True)
            continue
        messages = [*asked, {"role": "assistant", "content": answer}]
    return 0


def read_line() -> str | None:
    """The next line; None at the end of the input."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
