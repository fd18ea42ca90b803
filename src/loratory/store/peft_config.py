"""PEFT's adapter_config.json: what it may say, and which layers it means."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from loratory.runtime.layer import is_ours
from loratory.runtime.ties import tied_places
from loratory.runtime.where import ends_with, head_names
from loratory.sites.find import site_class

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."

# What the options of LoraConfig (PEFT 0.21) mean for a stored adapter. Read: those that this file and the loader use.
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights", "ensure_weight_tying", "base_model_name_or_path",
    "target_parameters",
}  # fmt: skip
# Of no effect on a stored adapter: bookkeeping, settings of starts, storage order of the base (seen from the layer itself).
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "fan_in_fan_out", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
_REFUSED = {
    "alora_invocation_tokens": "the adapter acts only after these tokens (Activated LoRA)",
    "arrow_config": "a router chooses among adapters at each token (Arrow)",
    "kasa_config": "the base weight is truncated and a diagonal stands between A and B (KaSA)",
    "layer_replication": "the base's layers are repeated",
    "lora_bias": "the update has a bias of its own",
    "megatron_config": "the base is made of Megatron's parallel layers",
    "monteclora_config": "the factors are random variables (MonteCLoRA)",
    "trainable_token_indices": "single rows of the embedding are trained",
    "use_bdlora": "the factors are block-diagonal (BD-LoRA)",
    "use_qalora": "the input is pooled before A (QA-LoRA)",
    "velora_config": "the backward pass is approximated (VeLoRA)",
}
_EMBEDDINGS = ("embed_tokens", "lm_head")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration, or an error that names the option we cannot keep."""
    file = path / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"'{file}' is not valid JSON ({e}); it is damaged: take another copy") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(
            f"'{file}' has peft_type {kind!r}; of PEFT's adapters LORA (with use_dora and use_rslora) is read: merge this one with PEFT, "
            "and load the merged model"
        )
    for key, value in config.items():
        if key in _READ or key in _WITHOUT_EFFECT or not value:
            continue
        why = _REFUSED.get(key, "which this Loratory does not know")
        raise ValueError(
            f"'{file}' sets {key}={_short(value)}: {why}, so the adapter would not compute the same here; merge it with PEFT, and load the merged model"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"'{file}' has init_lora_weights={start!r}, a start that changed the base weights, which the file does not hold; save it in PEFT with "
            "path_initial_model_for_weight_conversion=, which turns it into a plain LoRA"
        )
    if not isinstance(config.get("r", 8), int) or config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(
            f"'{file}' has r={config.get('r')!r} and bias={config.get('bias')!r}; r must be a positive integer, bias none, all or lora_only"
        )
    return config


def targets(model: nn.Module, config: dict[str, Any]) -> dict[str, nn.Module]:
    """The layers that the configuration means in this model, as PEFT chooses them."""
    modules = {n: m for n, m in model.named_modules() if n and not is_ours(n)}
    wanted = config.get("target_modules")
    if not wanted and config.get("target_parameters"):
        return {}
    if not wanted:
        raise ValueError(f"{CONFIG} has target_modules={wanted!r}; it must name the adapted layers")
    excluded = config.get("exclude_modules") or ()
    whole = config.get("modules_to_save") or ()
    chosen = {
        n: m
        for n, m in modules.items()
        if not (re.fullmatch(excluded, n) if isinstance(excluded, str) else ends_with(n, excluded))
        and not any(re.match(rf"(^|.*\.){key}($|\..*)", n) for key in whole)
    }
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        heads = head_names(model)
        return {
            n: m
            for n, m in chosen.items()
            if (site := site_class(m)) is not None and site.kind in ("linear", "conv1d-transposed") and n not in heads
        }
    if isinstance(wanted, str):
        return {n: m for n, m in chosen.items() if re.fullmatch(wanted, n)}
    return {n: m for n, m in chosen.items() if n in wanted or (ends_with(n, wanted) and _in_blocks(n, config))}


def tied_targets(model: nn.Module, config: dict[str, Any], layers: Iterable[str], keys: Iterable[str]) -> list[str]:
    """The other places of an adapted weight, which ensure_weight_tying gives the same LoRA, turned.

    PEFT ties where the target that it knows is called embed_tokens or lm_head, so a file decides where the name is another.
    """
    if not config.get("ensure_weight_tying"):
        return []
    wanted, layers, keys = config.get("target_modules") or (), set(layers), tuple(keys)
    known = any(w.split(".")[-1] in _EMBEDDINGS for w in wanted) if not isinstance(wanted, str) else False
    found = []
    for names in tied_places(model).values():
        owners = [n.removesuffix(".weight") for n in names]
        for n in owners if layers & set(owners) else ():
            if n not in layers and (known or any(key.startswith(f"{PREFIX}{n}.lora_") for key in keys)):
                found.append(n)
    return found


def saved_modules(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """The modules that modules_to_save means: those whose name ends so, wherever a part of a name begins."""
    keys = tuple(keys)
    return [
        n for n, _ in model.named_modules(remove_duplicate=False) if n and not is_ours(n) and keys and n.endswith(keys)
    ]


def pattern_value(patterns: dict[str, Any] | None, layer: str, default: Any) -> Any:
    """The value of rank_pattern or alpha_pattern for a layer: the first pattern that matches the end of its name."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def _in_blocks(name: str, config: dict[str, Any]) -> bool:
    blocks = config.get("layers_to_transform")
    if blocks is None or blocks == []:
        return True
    pattern = config.get("layers_pattern")
    patterns = [pattern] if isinstance(pattern, str) else pattern
    tries = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    found = next((m for p in tries if (m := re.match(p, name))), None)
    return found is not None and int(found.group(1)) in ({blocks} if isinstance(blocks, int) else set(blocks))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
