"""The model card of an adapter folder: README.md, made of what the folder itself says and of nothing else."""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from loratory.methods.registry import registered
from loratory.store import atomic
from loratory.store.inspection import Inspection
from loratory.version import __version__

CARD = "README.md"
HERE = "PATH/OF/THIS/FOLDER"  # stands for the adapter's place in a card until it is pushed
_TENSORS = ("adapter.safetensors", "adapter_model.safetensors")
_CHECKSUM = re.compile(r"SHA-256 of `([\w.]+)`: `([0-9a-f]{64})`")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = (".csv", ".conll", ".gguf", ".json", ".jsonl", ".parquet", ".txt")
_AUTO = {"LMHeadModel": "ForCausalLM", "ForConditionalGeneration": "ForSeq2SeqLM"}
_NOT_SHOWN = (  # paths of the machine it was trained on, and what the result does not depend on
    "base", "train", "dev", "test", "output_dir", "overwrite", "resume", "dry_run", "report_to", "device", "eval_before",
    "logging_steps", "save_steps", "save_total_limit",
)  # fmt: skip


def write_card(folder: Path, found: Inspection) -> None:
    """Write README.md beside an adapter; one that is there is replaced."""
    atomic.write_files(folder, {CARD: card(found).encode()})


def card(found: Inspection) -> str:
    """The card: YAML header, what it is, settings, layers, record of the training, how to load it."""
    peft = found.format.startswith("PEFT")
    parts = [
        _header(found, peft),
        f"# {_title(found)}",
        f"An adapter for {_base(found)}: the base's own weights are not in this folder.",
        "## Method",
        _method(found),
        "## Layers",
        _layers(found),
        *_training(found.training or {}),
        "## Use",
        _use(found, peft),
        f"Format: {found.format}. {_checksum(Path(found.folder))}. Card written by Loratory {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def named(text: str, repo_id: str, revision: str | None) -> str:
    """A card with the name on the hub where it said `HERE`."""
    for_peft = f'"{repo_id}", revision="{revision}"' if revision else f'"{repo_id}"'
    text = text.replace(f'PeftModel.from_pretrained(model, "{HERE}")', f"PeftModel.from_pretrained(model, {for_peft})")
    return text.replace(HERE, f"{repo_id}@{revision}" if revision else repo_id)


def check_card(folder: Path) -> None:
    """Refuse a card that names the checksum of other tensors than those beside it."""
    for name, digest in _CHECKSUM.findall((folder / CARD).read_text(encoding="utf-8")):
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            raise ValueError(
                f"'{folder / CARD}' describes another {name} than the one beside it; save again with card=True, or remove {CARD}"
            )


def hub_name(name: Any) -> str | None:
    """The name if it is one of the hub (`owner/name`), not a folder or file of this machine."""
    text = str(name or "")
    local = Path(text).exists() or Path(text).suffix.lower() in _FILES
    return text if _HUB_NAME.fullmatch(text) and not local else None


def _header(found: Inspection, peft: bool) -> str:
    record = found.training or {}
    base = hub_name(record.get("base") or found.base.get("name"))  # the record's is absolute if it was a folder
    data = hub_name(_part(record, "settings").get("train"))
    lines = [
        *([f"base_model: {base}", "base_model_relation: adapter"] if base else []),
        f"library_name: {'peft' if peft else 'loratory'}",
        *(["datasets:", f"- {data}"] if data else []),
        "tags:",
        *(f"- {tag}" for tag in dict.fromkeys((found.method, "lora" if peft else "loratory"))),
    ]
    return "\n".join(["---", *lines, "---"])


def _title(found: Inspection) -> str:
    return (
        f"{found.method} adapter for {_short(found.base.get('name')) or found.base.get('class') or 'an unnamed base'}"
    )


def _base(found: Inspection) -> str:
    name, kind = found.base.get("name"), found.base.get("class")
    about = ", ".join(str(each) for each in (kind, found.base.get("dtype")) if each)
    what = f"`{_short(name)}`" if name else "a base without a name"
    return what + (f" ({about})" if about else "")


def _short(name: Any) -> str:
    """A hub name, or the last part of a path: where somebody keeps the base is nobody else's business."""
    return hub_name(name) or Path(str(name or "")).name


def _method(found: Inspection) -> str:
    cls = registered().get(found.method)
    text = f"`{found.method}`" + (f": {cls.description()}" if cls else "")
    return text + "\n\n" + _table(("hyper-parameter", "value"), found.hyperparameters.items())


def _layers(found: Inspection) -> str:
    folded = Counter(_starred(name) for name in found.layers)
    lines = [f"- `{name}`" + (f" ({count} layers)" if count > 1 else "") for name, count in folded.items()]
    lines += [f"- `{name}`: in full" for name in found.also_train]
    text = "\n".join(lines) or "No single layer is adapted."
    if own := {name: over for name, over in found.layers.items() if over}:
        rows = ((f"`{name}`", ", ".join(f"{k} {_value(v)}" for k, v in over.items())) for name, over in own.items())
        text += "\n\nLayers with settings of their own:\n\n" + _table(("layer", "settings"), rows)
    result = _part(found.training, "result")
    share = (
        f" {result['trained']:,} of the {result['total']:,} numbers of the model were trained."
        if isinstance(result.get("trained"), int) and isinstance(result.get("total"), int)
        else ""
    )
    return f"{text}\n\nThe file holds {len(found.tensors)} tensors with {found.numbers:,} numbers.{share}"


def _training(record: dict[str, Any]) -> list[str]:
    """The record of the run, if there is one: settings, rows, figures before and after, versions."""
    if not record:
        return []
    parts = ["## Training"]
    result = _part(record, "result")
    plain = {k: v for k, v in record.items() if k != "base" and isinstance(v, str | int | float)}
    plain |= {k: v for k, v in _part(record, "settings").items() if k not in _NOT_SHOWN and v not in (None, "", [], {})}
    plain |= {f"{k} rows": v["rows"] for k, v in _part(record, "data").items() if isinstance(v, dict) and "rows" in v}
    plain |= {key: result[key] for key in ("steps", "best_step", "seconds") if result.get(key) is not None}
    plain |= {f"{name} version": text for name, text in _part(record, "versions").items()}
    if plain:
        parts.append(_table(("setting", "value"), plain.items()))
    rows = [
        (f"{title} {key}", *(_figure(result.get(when) or {}, key) for when in (before, after)))
        for title, before, after in (("dev", "before", "after"), ("test", "test_before", "test_after"))
        for key in result.get(after) or {}
    ]
    if rows:
        parts += ["Measured by the run itself, before and after training:", _table(("metric", "before", "after"), rows)]
    return parts if len(parts) > 1 else []


def _part(record: dict[str, Any] | None, key: str) -> dict[str, Any]:
    """A part of the record, which a user's own loop may have filled otherwise."""
    part = (record or {}).get(key)
    return part if isinstance(part, dict) else {}


def _use(found: Inspection, peft: bool) -> str:
    imports, base = _opening(found)
    ours = "\n".join(["import loratory as lt", *imports, "", base, f'lt.load(model, "{HERE}")'])
    text = f"With Loratory:\n\n```python\n{ours}\n```"
    if peft:
        theirs = ["from peft import PeftModel", *imports, "", base]
        theirs.append(f'model = PeftModel.from_pretrained(model, "{HERE}")')
        return "With PEFT:\n\n```python\n" + "\n".join(theirs) + f"\n```\n\n{text}"
    return text


def _opening(found: Inspection) -> tuple[list[str], str]:
    """Lines that import what opens the base, and the line that opens it."""
    name, kind = found.base.get("name"), str(found.base.get("class") or "")
    task = next((end for end in _AUTO if kind.endswith(end)), None)
    match = re.search(r"For[A-Z]\w*$", kind)
    if not name or not (task or match):
        return [], f"model = ...  # the base: {_short(name) or kind or 'not recorded'}"
    auto = "AutoModel" + (_AUTO[task] if task else match.group() if match else "")
    labels = _part(found.training, "task").get("labels")
    count = f", num_labels={len(labels)}" if isinstance(labels, list | tuple) and labels else ""
    where = hub_name(name) or f"PATH/OF/{_short(name)}"
    return [f"from transformers import {auto}"], f'model = {auto}.from_pretrained("{where}"{count})'


def _checksum(folder: Path) -> str:
    file = next(folder / name for name in _TENSORS if (folder / name).is_file())
    return f"SHA-256 of `{file.name}`: `{hashlib.sha256(file.read_bytes()).hexdigest()}`"


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(_value(cell) for cell in row) + " |" for row in rows)])


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
    return " ".join(text.replace("|", "\\|").split())


def _figure(values: dict[str, Any], key: str) -> str:
    return f"{values[key]:.4f}" if isinstance(values.get(key), int | float) else ""


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
