"""PEFT's X-LoRA in `loratory train`: a classifier that weighs finished LoRA adapters anew for every token.

PEFT 0.21 calls the experts "0", "1", ... and finds them under no other names. Saving, it takes each tensor with such a part in its name
for an expert's, and leaves it out: the classifier's own `layers.0` too. So experts are numbered here on the way in, and the folder is
written whole: the classifier in PEFT's file, and every expert beside it in experts/<number>.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loratory.store import atomic
from loratory.store.load import find_adapter
from loratory.store.peft_config import CONFIG, WEIGHTS

EXPERTS, CLASSIFIER = "experts", "internal_xlora_classifier"


def options_for(model: Any, given: Mapping[str, Any], gradient_checkpointing: bool) -> dict[str, Any]:
    """The options of XLoraConfig: experts by number, the classifier's width from the model.

    Raises ValueError or FileNotFoundError where an expert is missing or no plain LoRA in PEFT's format.
    """
    folders = given.get("adapters")
    if not isinstance(folders, Mapping) or len(folders) < 2:
        raise ValueError(
            f"peft.adapters is {folders!r}; peft:xlora mixes finished LoRA adapters, so name at least two: {{name: folder, name: folder}}"
        )
    if gradient_checkpointing:
        raise ValueError(
            "gradient_checkpointing runs layers again without X-LoRA's weights for its experts, so nothing would be learned; leave it out for peft:xlora"
        )
    model.config.use_cache = False  # each forward weighs all of its tokens
    numbered = {str(i): str(_expert(name, folder)) for i, (name, folder) in enumerate(folders.items())}
    return {"hidden_size": model.config.get_text_config().hidden_size, **given, "adapters": numbered}


def check_experts(model: Any) -> None:
    """Raises ValueError if an expert's file holds other tensors than its configuration asks for in this model."""
    from safetensors import safe_open

    for number, folder in model.active_peft_config.adapters.items():
        file = Path(folder) / WEIGHTS
        with safe_open(str(file), "pt") as opened:
            found = set(opened.keys())
        if strange := sorted(found ^ set(_tensors(model, number))):
            state = "holds" if strange[0] in found else "lacks"
            raise ValueError(
                f"'{file}' {state} '{strange[0]}', unlike a plain LoRA of this base as {CONFIG} describes it; take adapters of this base, trained "
                "without modules in full"
            )


def write(model: Any, folder: Path) -> None:
    """The classifier in PEFT's two files, and each expert in a folder of its own below."""
    from safetensors.torch import load_file, save_file

    model.save_pretrained(str(folder), safe_serialization=True, selected_adapters=["default"])
    classifier = {name: t for name, t in model.state_dict().items() if CLASSIFIER in name.split(".")}
    save_file(
        {name: t.cpu().contiguous() for name, t in (load_file(folder / WEIGHTS) | classifier).items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    numbers = list(model.active_peft_config.adapters)
    for number in numbers:
        model.peft_config[number].save_pretrained(str(folder / EXPERTS / number))
        expert = {name: t.detach().cpu().contiguous() for name, t in _tensors(model, number).items()}
        save_file(expert, folder / EXPERTS / number / WEIGHTS, metadata={"format": "pt"})
    _name_experts(folder, {number: f"{EXPERTS}/{number}" for number in numbers})


def config_of(model: Any, folder: Path) -> Any:
    """The folder's configuration with the experts where they lie now; the model is made ready for it."""
    from peft import XLoraConfig

    model.config.use_cache = False
    config = XLoraConfig.from_pretrained(str(folder))
    config.adapters = {number: str(folder / EXPERTS / number) for number in config.adapters}
    return config


def expert_files(folder: Path) -> list[Path]:
    """The experts' tensors, in order; none in the folder of another tuner."""
    return sorted(folder.glob(f"{EXPERTS}/*/{WEIGHTS}"))


def copy_experts(source: Path, folder: Path, final: Path) -> None:
    """The experts beside a copy of PEFT's two files, named by where they will lie, since PEFT takes the paths as they are."""
    shutil.copytree(source / EXPERTS, folder / EXPERTS)
    numbers = [file.parent.name for file in expert_files(source)]
    _name_experts(folder, {number: str(final.resolve() / EXPERTS / number) for number in numbers})


def _expert(name: str, folder: Any) -> Path:
    path = find_adapter(folder)
    out = f"for peft:xlora, expert '{name}' in '{path}' "
    if not (path / CONFIG).exists():
        raise ValueError(f"{out}must be in PEFT's format; write it with `loratory export {path} FOLDER --to peft`")
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        raise ValueError(
            f"{out}must be a plain LoRA (it has peft_type {config.get('peft_type')}, use_dora {config.get('use_dora')}, modules_to_save "
            f"{config.get('modules_to_save')}); take another, or export it with --rank"
        )
    if not (path / WEIGHTS).is_file():
        raise FileNotFoundError(f"{out}has no {WEIGHTS}; copy the whole folder")
    return path


def _tensors(model: Any, number: str) -> dict[str, Tensor]:
    """An expert's tensors by their keys in its own file."""
    found = {}
    for name, p in model.named_parameters():
        parts = name.removeprefix("base_model.lora_model.").split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith("lora_")), None)
        if at is not None and parts[at + 1 : at + 2] == [number]:
            found[".".join(["base_model", *parts[: at + 1], *parts[at + 2 :]])] = p
    return found


def _name_experts(folder: Path, places: dict[str, str]) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_bytes(atomic.to_json(config | {"adapters": places}))
