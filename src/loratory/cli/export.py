"""`loratory export`: an adapter for other programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory export ADAPTER OUTPUT [--to peft|gguf|merged] [--rank R] [--for vllm|lorax] [--push OWNER/NAME]"


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write an adapter in PEFT's format, in llama.cpp's, or merged into its base."""

    adapter: str  # adapter folder, output_dir of a run, or hub name
    output: str  # folder to write
    to: Literal["peft", "gguf", "merged"] = "peft"  # PEFT's two files, llama.cpp's adapter.gguf, or a plain model
    rank: int | None = None  # any method as a plain LoRA of at most this rank; default: LoRA and DoRA as they are
    limit: float = 0.05  # allowed relative error of that
    for_: Literal["vllm", "lorax"] | None = None  # refuse a PEFT folder that this server would not load or misread
    base: str | None = None  # default: the one recorded in the adapter
    dtype: str | None = None  # float32, bfloat16, float16; default: as trained
    device: str = "auto"  # cpu, cuda, mps
    overwrite: bool = False  # replace what the folder holds
    card: bool = False  # write a model card (README.md) beside the adapter
    push: str | None = None  # push adapter and card to the hub: owner/name
    private: bool = False  # a repository made by --push is private
    json: bool = False  # print the error, layer by layer, as JSON
    dequantize: bool = False  # write a quantised base in full precision


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
    from loratory.store.servers import serve_line
    from loratory.train import peft_bridge
    from loratory.train.opened import open_adapter

    check_free(settings.output, overwrite=settings.overwrite, out="--overwrite")
    quiet()
    bridged = peft_bridge.find_bridged(settings.adapter)
    if bridged is not None and settings.to == "peft":
        peft_bridge.read_record(bridged)
        peft_bridge.copy_peft(bridged, settings.output, overwrite=settings.overwrite)
        print(f"wrote {settings.output} ({settings.to})")
        return 0
    opened = open_adapter(settings.adapter, settings.base, dtype=settings.dtype, device=settings.device)
    if bridged is not None:
        record: Any = peft_bridge.write_merged(
            opened.model,
            settings.adapter,
            settings.output,
            tokenizer=opened.tokenizer,
            tolerance=None,
            overwrite=settings.overwrite,
        )
    else:
        record = lt.export(
            opened.model,
            settings.output,
            to=settings.to,
            rank=settings.rank,
            limit=settings.limit,
            server=settings.for_,
            tokenizer=opened.tokenizer,
            overwrite=settings.overwrite,
            card=settings.card or bool(settings.push),
            dequantize=settings.dequantize,
        )
    if settings.json:
        print(
            json.dumps(
                {"output": settings.output, "to": settings.to, "error": asdict(record) if record is not None else None}
            )
        )
        return 0
    if record is not None:
        print(record)
    print(f"wrote {settings.output} ({settings.to})")
    if settings.push:
        print(f"pushed to {lt.push_to_hub(settings.output, settings.push, private=settings.private)}")
    if settings.for_ is not None:
        print(serve_line(Path(settings.output), opened.base, settings.for_))
    return 0
