"""What the benchmarks have in common: a model of SmolLM2-135M's shapes, and the record of a measurement."""

import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import loratory as lt
from loratory.store.atomic import write_files

RESULTS = Path(__file__).parent / "results"


def smollm2(layers: int = 30) -> Any:
    """A model of SmolLM2-135M's shapes with random weights."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )


def about(command: str, *packages: str) -> dict[str, Any]:
    """How, when, where and with which versions a measurement was made."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: version(name) for name in packages}
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions | {"loratory": lt.__version__},
    }


def told(record: dict[str, Any]) -> str:
    """The same in words."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"`{record['command']}`, {record['date']}, {record['machine']}; {versions}"


def head(names: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def write(out: Path, name: str, record: dict[str, Any], text: str) -> None:
    """The record as NAME.json and the text as NAME.md."""
    out.mkdir(parents=True, exist_ok=True)
    write_files(out, {f"{name}.json": json.dumps(record, indent=1).encode(), f"{name}.md": text.encode()})


def read(out: Path, name: str) -> dict[str, Any]:
    """The record of an earlier run."""
    return json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
