"""`loratory merge`: base and adapter as one plain model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory merge ADAPTER OUTPUT [--base BASE] [--overwrite]"


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """Write base and adapter as one plain model with its tokenizer, which transformers loads without loratory."""

    adapter: str  # adapter folder, output_dir of a run, or hub name
    output: str  # folder for the model
    base: str | None = None  # default: the one recorded in the adapter
    dtype: str | None = None  # float32, bfloat16, float16; default: as trained
    device: str = "auto"  # cpu, cuda, mps
    tolerance: float | None = None  # allowed error of the merge, relative to the logits' range
    overwrite: bool = False  # replace what the folder holds
    dequantize: bool = False  # write a quantised base in full precision
    json: bool = False  # print the error of the merge as JSON


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(MergeSettings, USAGE))
        return 0
    settings = parse(MergeSettings, arguments, positional=("adapter", "output"))
    import loratory as lt
    from loratory.cli.quiet import quiet
    from loratory.store.atomic import check_free
    from loratory.train.opened import open_adapter
    from loratory.train.peft_bridge import write_merged

    check_free(settings.output, overwrite=settings.overwrite, out="--overwrite")
    quiet()
    opened = open_adapter(settings.adapter, settings.base, dtype=settings.dtype, device=settings.device)
    options: Any = {"tokenizer": opened.tokenizer, "tolerance": settings.tolerance, "overwrite": settings.overwrite}
    if opened.bridged:
        check: Any = write_merged(opened.model, settings.adapter, settings.output, **options)
    else:
        check = lt.export(opened.model, settings.output, to="merged", dequantize=settings.dequantize, **options)
    if settings.json:
        print(json.dumps({"output": settings.output, "check": asdict(check) if check is not None else None}))
    else:
        print(f"{check}\nwrote {settings.output}")
    return 0
