"""`loratory generate`: answers to prompts, many at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory generate ADAPTER [PROMPT ...] [--file PROMPTS.txt | --data ROWS.jsonl] [--json]"


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Answer prompts: words of the command, lines of a file, rows of data, or lines of the standard input."""

    adapter: str  # adapter folder, output_dir of a run, or hub name
    prompts: list[str] = field(default_factory=list)  # the prompts themselves
    file: str | None = None  # file with one prompt a line; - for the standard input
    data: str | None = None  # rows with the columns of the training data
    rows: int | None = None  # use only the first so many
    without: bool = False  # answer by the base, without the adapter
    system: str | None = None  # system message before every prompt
    max_new_tokens: int = 128  # length of an answer at most
    temperature: float = 0.0  # 0: the likeliest word each time; higher: more chance
    top_p: float = 1.0  # draw only among the likeliest words of this total probability
    seed: int = 0  # of the draws
    base: str | None = None  # default: the one recorded in the adapter
    dtype: str | None = None  # float32, bfloat16, float16; default: as trained
    device: str = "auto"  # cpu, cuda, mps
    batch_size: int = 8  # prompts at once
    json: bool = False  # one JSON object a line


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(GenerateSettings, USAGE))
        return 0
    settings = parse(GenerateSettings, arguments, positional=("adapter",), rest="prompts")
    import torch

    from loratory.cli.quiet import quiet
    from loratory.tasks.data import read_rows
    from loratory.train.opened import open_adapter

    given = sum([bool(settings.prompts), settings.file is not None, settings.data is not None])
    if given > 1:
        raise ValueError("prompts come from one place: words, --file or --data; give only one of them")
    prompts = list(settings.prompts) if settings.prompts else [] if settings.data else read_prompts(settings.file)
    rows = read_rows(settings.data)[: settings.rows] if settings.data else []
    if not prompts and not rows:
        raise ValueError(
            "there is no prompt; give one behind the adapter, or --file, or --data, or lines on the standard input"
        )
    prompts = prompts[: settings.rows]
    options = sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
    quiet()
    opened = open_adapter(settings.adapter, settings.base, dtype=settings.dtype, device=settings.device)
    torch.manual_seed(settings.seed)
    with opened.without() if settings.without else nullcontext():
        answer(opened, settings, prompts, rows, options)
    return 0


def answer(
    opened: Any, settings: GenerateSettings, prompts: list[str], rows: list[Any], options: dict[str, Any]
) -> None:
    """Answer the prompts, or the rows, and print what comes. options: keywords of model.generate."""
    if rows:
        if opened.task is None:
            raise ValueError(f"'{settings.adapter}' does not say how its rows are read; give prompts instead of --data")
        can_sample = hasattr(opened.task, "max_new_tokens")
        answers = opened.task.predict(
            opened.model, opened.tokenizer, rows, settings.batch_size, **(options if can_sample else {})
        )
        shown: list[Any] = list(rows)
    else:
        encoded = [prompt_ids(opened, each, settings.system) for each in prompts]
        shown = list(prompts)
        if len(prompts) == 1 and not settings.json:
            stream_answer(opened, encoded[0], options)
            return
        from loratory.tasks.generation import generate_texts

        answers = generate_texts(opened.model, opened.tokenizer, encoded, batch_size=settings.batch_size, **options)
    for prompt, answer in zip(shown, answers, strict=True):
        if settings.json:
            print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False, default=named))
        elif len(shown) == 1:
            print(answer)
        else:
            print(
                f"> {json.dumps(prompt, ensure_ascii=False, default=named) if isinstance(prompt, dict) else prompt}\n{answer}\n"
            )


def named(value: Any) -> str:
    """What stands for an image in an answer: where it is."""
    return str(getattr(value, "name", value))


def read_prompts(file: str | None) -> list[str]:
    """One prompt a line, from a file or the standard input."""
    if file is None and sys.stdin.isatty():
        return []
    lines = sys.stdin.readlines() if file in (None, "-") else open(file, encoding="utf-8").readlines()  # type: ignore[arg-type] # noqa: SIM115
    return [line.strip() for line in lines if line.strip()]


def sampling(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """Keywords of model.generate. Raises ValueError for values outside their range."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 (the likeliest word) or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must lie above 0 and be at most 1")
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    return {"max_new_tokens": max_new_tokens, **drawn}


def prompt_ids(opened: Any, prompt: str, system: str | None = None) -> list[int]:
    """Tokens to answer from: a conversation for models trained on chat, else the text itself."""
    from loratory.tasks.chat import Chat

    if isinstance(opened.task, Chat) or (opened.task is None and opened.tokenizer.chat_template):
        task = opened.task or Chat()
        system = system or task.system
        messages = [{"role": "system", "content": system}] if system else []
        return list(task.prompt_ids([*messages, {"role": "user", "content": prompt}], opened.tokenizer))
    if (
        opened.task is not None
        and not hasattr(opened.task, "max_new_tokens")
        and not hasattr(opened.task, "max_target_length")
    ):
        raise ValueError(f"task '{opened.task.name}' answers with labels, not text; give rows with --data")
    return [token for token in opened.tokenizer(prompt)["input_ids"] if token != opened.tokenizer.eos_token_id]


def stream_answer(opened: Any, ids: list[int], options: dict[str, Any]) -> str:
    """Print an answer word by word as it comes; returns it."""
    import torch
    from transformers import TextStreamer

    from loratory.tasks.generation import end_ids
    from loratory.tasks.task import pad_id

    pieces: list[str] = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            print(text, end="\n" if stream_end else "", flush=True)

    limit = getattr(opened.model.config, "max_position_embeddings", None)
    if limit is not None and len(ids) + options["max_new_tokens"] > limit:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and max_new_tokens is {options['max_new_tokens']}, but the model has {limit} positions; "
            "shorten one of them"
        )
    batch = torch.tensor([ids], device=opened.model.device)
    streamer = (
        None
        if opened.model.config.is_encoder_decoder
        else Streamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    with torch.no_grad():
        out = opened.model.generate(
            input_ids=batch,
            attention_mask=torch.ones_like(batch),
            streamer=streamer,
            pad_token_id=pad_id(opened.tokenizer),
            eos_token_id=end_ids(opened.model, opened.tokenizer) or None,
            **options,
        )
    if streamer is None:
        pieces = [opened.tokenizer.decode(out[0], skip_special_tokens=True)]
        print(pieces[0])
    return "".join(pieces).strip()
