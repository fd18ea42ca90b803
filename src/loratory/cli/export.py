"""`loratory export`: an adapter for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory export ADAPTER OUTPUT [--to peft|merged] [--push OWNER/NAME]"


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write an adapter in PEFT's format, or merged into its base."""

    adapter: str  # adapter folder, output_dir of a run, or hub name
    output: str  # folder to write
    to: Literal["peft", "merged"] = (
        "peft"  # peft: adapter_config.json and adapter_model.safetensors; merged: a plain model
    )
    base: str | None = None  # default: the one recorded in the adapter
    dtype: str | None = None  # float32, bfloat16, float16; default: as trained
    device: str = "auto"  # cpu, cuda, mps
    overwrite: bool = False  # replace what the folder holds
    card: bool = False  # write a model card (README.md) beside the adapter
    push: str | None = None  # push adapter and card to the hub: owner/name
    private: bool = False  # a repository made by --push is private


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(ExportSettings, USAGE))
        return 0
    settings = parse(ExportSettings, arguments, positional=("adapter", "output"))
    if settings.to == "merged" and (settings.card or settings.push):
        flag = "card" if settings.card else "push"
        raise ValueError(
            f"--{flag} is for adapters; a merged model is a plain folder, which `hf upload owner/name {settings.output}` pushes"
        )
    if settings.private and not settings.push:
        raise ValueError("--private says how --push makes the repository; give --push owner/name too")
    import loratory as lt
    from loratory.cli.quiet import quiet
    from loratory.store.atomic import check_free
    from loratory.train.opened import open_adapter

    check_free(settings.output, overwrite=settings.overwrite, out="--overwrite")
    quiet()
    opened = open_adapter(settings.adapter, settings.base, dtype=settings.dtype, device=settings.device)
    check = lt.export(
        opened.model,
        settings.output,
        to=settings.to,
        tokenizer=opened.tokenizer,
        overwrite=settings.overwrite,
        card=settings.card or bool(settings.push),
    )
    if check is not None:
        print(check)
    print(f"wrote {settings.output} ({settings.to})")
    if settings.push:
        print(f"pushed to {lt.push_to_hub(settings.output, settings.push, private=settings.private)}")
    return 0
