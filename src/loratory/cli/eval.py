"""`loratory eval`: held-out metrics of an adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from loratory.cli.arguments import asks_help, parse, verb_help

USAGE = "loratory eval ADAPTER [--data FILE] [--json]"


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Measure an adapter on data."""

    adapter: str  # adapter folder, output_dir of a run, or hub name
    data: str | None = None  # rows: file, folder or `datasets` name; default: the run's own test or dev data
    split: str | None = None  # train, dev or test, where data holds several
    rows: int | None = None  # use only the first so many
    without: bool = False  # measure the base without the adapter too
    draws: int = 0  # bootstrap draws for 95 % intervals; 1000 is usual
    base: str | None = None  # default: the one recorded in the adapter
    task: str | None = None  # default: the one recorded in the adapter
    dtype: str | None = None  # float32, bfloat16, float16; default: as trained
    device: str = "auto"  # cpu, cuda, mps
    batch_size: int = 8  # rows at once
    json: bool = False  # print JSON


def run(arguments: Sequence[str]) -> int:
    if asks_help(arguments):
        print(verb_help(EvalSettings, USAGE))
        return 0
    settings = parse(EvalSettings, arguments, positional=("adapter",))
    from loratory.cli.quiet import quiet
    from loratory.tasks.data import read_data, read_rows
    from loratory.train.opened import open_adapter

    quiet()
    opened = open_adapter(
        settings.adapter, settings.base, task=settings.task, dtype=settings.dtype, device=settings.device
    )
    if opened.task is None:
        raise ValueError(f"'{settings.adapter}' does not say which task it was trained for; give --task")
    trained_on = opened.training.get("settings", {})
    source, split = settings.data or trained_on.get("test"), settings.split or "test"
    if source is not None:
        split = settings.split or ("train" if settings.data is None else split)
        try:
            rows = read_rows(source, split=split)
        except ValueError:
            if settings.split is not None:
                raise
            rows = read_rows(source)
    elif trained_on.get("train"):
        splits = read_data(trained_on["train"], dev=trained_on.get("dev"), seed=trained_on.get("seed", 0))
        rows, source = (
            (splits.test, f"{trained_on['train']} (test)")
            if splits.test
            else (splits.dev, f"{trained_on['train']} (dev)")
        )
    else:
        raise ValueError(f"'{settings.adapter}' does not say what data to measure on; give --data")
    rows = rows[: settings.rows]
    task = opened.task if opened.training else opened.task.resolve(rows)
    measured = {
        "adapter": task.evaluate(opened.model, opened.tokenizer, rows, settings.batch_size, draws=settings.draws)
    }
    if settings.without:
        with opened.without():
            measured["base"] = task.evaluate(
                opened.model, opened.tokenizer, rows, settings.batch_size, draws=settings.draws
            )
    if settings.json:
        print(json.dumps({"data": str(source), "rows": len(rows), **measured}))
        return 0
    print(f"{task.name} on {source}, {len(rows)} rows")
    print(f"{'':24}" + "".join(f"{name:>12}" for name in measured))
    for key in measured["adapter"]:
        print(f"{key:24}" + "".join(f"{values[key]:12.4f}" for values in measured.values()))
    return 0
