"""What servers of many LoRA adapters load: their rules for a PEFT folder, each broken one with its message.

Read from the sources of vLLM (lora/peft_helper.py, lora/lora_model.py, config/lora.py) and LoRAX (adapters/lora.py, utils/sgmv.py), 2026.
Both take one r and one lora_alpha for all layers: they do not read the patterns of the configuration, so the scale would be wrong.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from loratory.runtime.layer import is_ours
from loratory.store.peft_config import CONFIG, PREFIX, WEIGHTS

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
LORAX_RANK = 128  # the largest of its kernels
PROJECTIONS = (  # linear layers that both serve with LoRA, as transformers' models call them
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2",
    "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head",
)  # fmt: skip


def check_server(model: nn.Module, folder: Path, server: str) -> None:
    """Raise ValueError with everything in a PEFT folder that the server would refuse or leave out."""
    if server not in _RULES:
        raise ValueError(f"server is {server!r}; it must be one of {', '.join(_RULES)}")
    config = _config(folder)
    with safe_open(folder / WEIGHTS, "pt") as file:
        keys = [key.removeprefix(PREFIX) for key in file.keys()]  # noqa: SIM118
    broken = [*_common(config, keys), *_RULES[server](model, config, keys)]
    if broken:
        raise ValueError(f"{server} would not serve this adapter as it was trained: {'; '.join(broken)}")


def serve_line(folder: Path, base: str, server: str) -> str:
    """How to start the server with an adapter."""
    if server == "lorax":
        return f"serve it with: lorax-launcher --model-id {base} --adapter-id {folder} --adapter-source local"
    setting = next(r for r in VLLM_RANKS if r >= _config(folder)["r"])
    return f"serve it with: vllm serve {base} --enable-lora --max-lora-rank {setting} --lora-modules {folder.name}={folder}"


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config


def _common(config: dict[str, Any], keys: list[str]) -> list[str]:
    out = []
    if config["use_dora"]:
        out.append("DoRA is not supported: export the nearest LoRA with rank=")
    if config["modules_to_save"]:
        out.append(
            f"modules_to_save holds {', '.join(config['modules_to_save'])}, it must be empty: train without also_train="
        )
    elif beside := [key for key in keys if ".lora_" not in key and not key.endswith(".bias")]:
        out.append(f"'{beside[0]}' is stored beside the factors, and would not be read: train without new tokens")
    if config["bias"] != "none":
        out.append(f"bias is {config['bias']!r}, it must be 'none': train without bias=")
    for pattern, field in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if config[pattern]:
            layer, value = next(iter(config[pattern].items()))
            out.append(
                f"layer '{layer.removeprefix('^').replace(chr(92), '')}' has {field} {value} where others have {config[field]}, and one {field} "
                "is read for all: give all layers one rank (loratory.change_rank) and one alpha"
            )
    strange = sorted({layer.split(".")[-1] for layer in _layers(keys)} - set(PROJECTIONS))
    if strange:
        out.append(
            f"layers named {', '.join(strange)} are not served with LoRA, only {', '.join(PROJECTIONS)}: leave them out (exclude=)"
        )
    return out


def _vllm(model: nn.Module, config: dict[str, Any], keys: list[str]) -> list[str]:
    if config["r"] > VLLM_RANKS[-1]:
        return [f"rank {config['r']} is above {VLLM_RANKS[-1]}, the largest --max-lora-rank: export with a lower rank="]
    return []


def _lorax(model: nn.Module, config: dict[str, Any], keys: list[str]) -> list[str]:
    out = []
    if config["r"] > LORAX_RANK:
        out.append(f"rank {config['r']} is above {LORAX_RANK}, the largest its kernels take: export with a lower rank=")
    adapted = _layers(keys)
    for kind in sorted({layer.split(".")[-1] for layer in adapted} & set(PROJECTIONS)):
        same = [n for n, _ in model.named_modules() if n.split(".")[-1] == kind and not is_ours(n)]
        if left := [n for n in same if n not in adapted]:
            out.append(
                f"'{left[0]}' has no factors while other {kind} layers have, and then none is served: adapt every {kind}, or none"
            )
    return out


def _layers(keys: list[str]) -> set[str]:
    return {key.rpartition(".lora_")[0] for key in keys if ".lora_" in key}


_RULES: dict[str, Callable[[nn.Module, dict[str, Any], list[str]], list[str]]] = {"lorax": _lorax, "vllm": _vllm}
