"""`loratory export`: an adapter for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory export ADAPTER OUTPUT [--to peft|merged]"


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write an adapter in PEFT's format, or merged into its base."""

    adapter: str  # adapter folder, or output_dir of a run
    output: str  # folder to write
    to: Literal["peft", "merged"] = (
        "peft"  # peft: adapter_config.json and adapter_model.safetensors; merged: a plain model
    )
    base: str | None = None  # default: the one recorded in the adapter
    dtype: str | None = None  # float32, bfloat16, float16; default: as trained
    device: str = "auto"  # cpu, cuda, mps
    overwrite: bool = False  # replace what the folder holds


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(ExportSettings, USAGE))
        return 0
    settings = parse(ExportSettings, arguments, positional=("adapter", "output"))
    import loratory as lt
    from loratory.cli.quiet import quiet
    from loratory.store.atomic import check_free
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
    options: Any = {"tokenizer": opened.tokenizer, "overwrite": settings.overwrite}
    if bridged is not None:
        check: Any = peft_bridge.write_merged(
            opened.model, settings.adapter, settings.output, tolerance=None, **options
        )
    else:
        check = lt.export(opened.model, settings.output, to=settings.to, **options)
    if check is not None:
        print(check)
    print(f"wrote {settings.output} ({settings.to})")
    return 0
