"""PEFT's adapter folders (LoRA, DoRA, rsLoRA), read without PEFT; `peft_write` writes them."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from loratory.methods.dora import DoRA
from loratory.methods.lora import LoRA
from loratory.methods.method import Method, trained
from loratory.runtime.attach import Built, install
from loratory.runtime.attachable import check_attachable, check_layer
from loratory.runtime.layer import fill_copies, is_ours
from loratory.runtime.route import disabled
from loratory.runtime.state import Adaptation, is_adapted, unwrap
from loratory.runtime.ties import tied_places
from loratory.runtime.where import ends_with
from loratory.sites import Bare, Site, find_site, target
from loratory.store.inspection import Inspection
from loratory.store.peft_config import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    pattern_value,
    read_config,
    saved_modules,
    targets,
    tied_targets,
)
from loratory.store.peft_layer import check_conv, from_peft, shapes
from loratory.store.peft_parameter import parameter, parameter_targets
from loratory.store.pickles import refuse_pickles


def is_peft(path: Path) -> bool:
    return (path / CONFIG).exists() and not (path / "adapter.json").exists()


def load_peft(model: nn.Module, path: Path, *, name: str, trainable: bool) -> None:
    """Add the adapter of a PEFT folder and make it the active one.

    Raises FileNotFoundError, ValueError (an option we do not have, damaged file, missing, unexpected or misshapen tensors),
    all before the model changes.
    """
    config = read_config(path)
    tensors = _read_tensors(path)
    model = unwrap(model)
    check_attachable(model, name)
    if trainable and config.get("init_lora_weights") == "mica":
        raise ValueError(f"'{path}' is a MiCA adapter, whose B is not trained; load it without trainable=True")
    with disabled(model) if is_adapted(model) else nullcontext():  # names and ties of the base, whatever is active
        adaptation, built, values = _read(model, path, config, tensors, trainable)
    install(model, name, adaptation, built, trainable=trainable)
    fill_copies(model, name, values)


def _read(
    model: nn.Module, path: Path, config: dict[str, Any], tensors: dict[str, Tensor], trainable: bool
) -> tuple[Adaptation, Built, dict[str, Tensor]]:
    layers: dict[str, Any] = dict(targets(model, config))
    tied = tied_targets(model, config, layers, tensors)
    if tied and trainable:
        raise ValueError(
            f"'{path / CONFIG}' ties the LoRA of '{tied[0]}' to that of the embedding (ensure_weight_tying), and further training here would part "
            "the two; load it without trainable=True, or train it on in PEFT (`loratory train --method peft:lora`)"
        )
    layers |= {n: model.get_submodule(n) for n in tied}
    if hit := [n for n in layers if isinstance(target(model, n), Bare)]:
        raise ValueError(
            f"'{path / CONFIG}' targets '{hit[0]}', whose MultiheadAttention reads its weight and never calls it, so PEFT's adapter there has no "
            "effect; train it without this layer"
        )
    begins = {layer: f"{layer}." for layer in layers}  # of a layer's keys in the file
    named = dict.fromkeys(layers, "")  # the parameter's name in the configuration, for those of target_parameters
    for full, begin in parameter_targets(model, config.get("target_parameters")).items():
        layer, part = parameter(model, full)
        layers[layer], begins[layer], named[layer] = part, begin, full
    if not layers:
        raise ValueError(
            f"no layer of this {type(model).__name__} matches target_modules={config.get('target_modules')!r} of '{path / CONFIG}'; "
            f"load the base it was made for{_base(config)}"
        )
    dora = bool(config.get("use_dora"))
    sites: dict[str, Site] = {}
    methods: dict[str, Method] = {}
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for layer, module in layers.items():
        check_layer(model, layer, module)
        site = sites[layer] = find_site(layer, module)
        check_conv(site, dora)
        methods[layer] = _method(config, site, named[layer])
        rank = pattern_value(config.get("rank_pattern"), named[layer] or layer, config.get("r", 8))
        parts[layer] = shapes(site, rank, dora, bool(named[layer]))
    wanted = {begins[layer] + key: shape for layer, part in parts.items() for key, shape in part.items()}
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if not is_ours(n)}
    in_full = _in_full(model, config, layers, own)
    wanted |= {n: tuple(own[n].shape) for n in in_full}
    found = {_plain(key, layers): t for key, t in tensors.items()}
    extra = {n for n in found if n in own and n not in wanted and _may_be_beside(model, n, config)}
    _check(model, path, config, found, wanted | {n: tuple(own[n].shape) for n in extra})
    built: Built = {}
    for layer, site in sites.items():
        own_tensors = from_peft(site, {key: found[begins[layer] + key] for key in parts[layer]}, bool(named[layer]))
        built[layer] = (site, methods[layer], {n: trained(t, decay=n != "m") for n, t in own_tensors.items()})
    values, kept, untied = _copies(model, config, in_full, extra, found)
    bias = {"lora_only": "adapted"}.get(config.get("bias", "none"), config.get("bias", "none"))
    adaptation = Adaptation(_method(config), methods, list(values), bias=bias, untied=untied, kept=kept)
    return adaptation, built, values


def inspect_peft(path: Path) -> Inspection:
    """What a PEFT folder holds, read without its base."""
    config, file = read_config(path), path / WEIGHTS
    tensors = {k.removeprefix(PREFIX): t for k, t in _read_tensors(path).items()}
    method, layers, also = _method(config), {}, []
    owners = {n.rpartition(".")[0] for n in config.get("target_parameters") or ()}
    for key, t in sorted(tensors.items(), key=lambda item: _in_order(item[0])):
        for end in (".lora_A.weight", ".lora_embedding_A"):
            if key.endswith(end):
                layer = key.removesuffix(end)
                rank = pattern_value(config.get("rank_pattern"), layer, method.rank)
                stacked = ends_with(layer.replace(".base_layer", ""), owners)  # A of all entries together
                over = {
                    "rank": rank if stacked else t.shape[0],
                    "alpha": float(pattern_value(config.get("alpha_pattern"), layer, method.alpha)),
                }
                layers[layer] = {k: v for k, v in over.items() if v != getattr(method, k)}
        if ".lora_" not in key:
            also.append(key)
    size = sum(f.stat().st_size for f in (file, path / CONFIG))
    return Inspection(
        str(path), f"PEFT {config.get('peft_version') or ''}".strip(), "dora" if isinstance(method, DoRA) else "lora",
        method.hyperparameters(), layers, {k: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in tensors.items()},
        sorted(also), {"name": config.get("base_model_name_or_path")}, None, size,
    )  # fmt: skip


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS
    if not file.exists():
        refuse_pickles(path)
        raise FileNotFoundError(f"'{path}' holds {CONFIG} but not {WEIGHTS}; copy the whole folder")
    try:
        tensors = safetensors.torch.load(file.read_bytes())
    except SafetensorError as e:
        raise ValueError(f"'{file}' cannot be read as safetensors ({e}); it is damaged: take another copy") from None
    for key, t in tensors.items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            raise ValueError(f"'{file}': tensor '{key}' holds NaN or infinity; take another checkpoint")
    return tensors


def _method(config: dict[str, Any], site: Site | None = None, parameter: str = "") -> LoRA | DoRA:
    """The adapter's method, or that of one layer."""
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    dropout, rslora = float(config.get("lora_dropout", 0.0)), bool(config.get("use_rslora"))
    if site is not None:
        rank = pattern_value(config.get("rank_pattern"), parameter or site.name, rank)
        alpha = pattern_value(config.get("alpha_pattern"), parameter or site.name, alpha)
        if not site.can_drop:
            dropout = 0.0  # PEFT drops nothing at an embedding, and refuses dropout beside target_parameters
        groups = math.prod(site.stack) if site.kind == "conv" else 1
        if groups > 1:  # PEFT counts the channels of all groups, we those of one
            rank, alpha = rank // groups, alpha / (math.sqrt(groups) if rslora else groups)
    start = "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming"
    kind: type[LoRA] | type[DoRA] = DoRA if config.get("use_dora") else LoRA
    try:
        return kind(rank=rank, alpha=float(alpha), dropout=dropout, rslora=rslora, start=start)  # type: ignore[arg-type]
    except (TypeError, ValueError) as e:
        raise ValueError(f"{CONFIG} of the PEFT adapter{f', layer {site.name!r}' if site else ''}: {e}") from None


def _in_full(
    model: nn.Module, config: dict[str, Any], layers: dict[str, nn.Module], own: dict[str, Tensor]
) -> list[str]:
    """Names of the base tensors that the adapter must hold in full."""
    names = [
        n
        for module in saved_modules(model, config.get("modules_to_save") or ())
        for n in own
        if n.startswith(module + ".")
    ]
    bias = config.get("bias", "none")
    if bias == "all":
        names += [n for n, t in own.items() if n.split(".")[-1] == "bias" and isinstance(t, nn.Parameter)]
    elif bias == "lora_only":
        names += [f"{layer}.bias" for layer in layers if f"{layer}.bias" in own]
    return list(dict.fromkeys(names))


def _plain(key: str, layers: dict[str, nn.Module]) -> str:
    """A file's key as the name of a layer's tensor or of the base's."""
    key = key.removeprefix(PREFIX)
    layer, _, leaf = key.rpartition(".base_layer.")
    return f"{layer}.{leaf}" if layer in layers else key


def _may_be_beside(model: nn.Module, name: str, config: dict[str, Any]) -> bool:
    """PEFT saves a resized or adapted vocabulary beside, and with bias="all" everything with bias in its name."""
    if config.get("bias", "none") == "all" and "bias" in name:
        return True
    owner = model.get_submodule(name.rpartition(".")[0])
    ends = [getattr(model, f"get_{end}_embeddings", lambda: None) for end in ("input", "output")]
    return any(owner is end() for end in ends)


def _check(
    model: nn.Module, path: Path, config: dict[str, Any], found: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]
) -> None:
    here = f"this {type(model).__name__}"
    out = f"; load the base it was made for{_base(config)}, or take another copy of the file"
    if missing := [n for n in wanted if n not in found]:
        raise ValueError(
            f"'{path / WEIGHTS}' lacks {len(missing)} of the {len(wanted)} tensors that {CONFIG} asks for in {here}: {_first(missing)}{out}"
        )
    if unexpected := [n for n in found if n not in wanted]:
        raise ValueError(
            f"'{path / WEIGHTS}' holds {len(unexpected)} tensors that have no place in {here}: {_first(unexpected)}{out}"
        )
    for n, shape in wanted.items():
        if tuple(found[n].shape) != shape:
            raise ValueError(
                f"'{n}' is {tuple(found[n].shape)} in '{path / WEIGHTS}', but {here} and {CONFIG} give {shape}; load the base it was made for"
                f"{_base(config)} (after new tokens: model.resize_token_embeddings), or correct r and rank_pattern"
            )


def _copies(
    model: nn.Module, config: dict[str, Any], in_full: list[str], extra: set[str], found: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], bool]:
    """Values of the tensors held in full; which of them are not trained; whether tied ones are parted.

    PEFT gives each module of modules_to_save weights of its own, also where the base ties them (unless ensure_weight_tying);
    everything else goes into the base's parameter, in all its places.
    """
    values = {n: found[n] for n in in_full}
    untied = False
    base = dict(model.named_parameters(remove_duplicate=False))
    places = {n: names for names in tied_places(model).values() for n in names}
    for n in in_full:
        others = [p for p in places.get(n, []) if p != n]
        if config.get("ensure_weight_tying"):
            values |= dict.fromkeys(others, found[n])
        elif others:
            untied = True
    kept = []
    for n in sorted(extra):
        if n in base and torch.equal(base[n].detach().cpu(), found[n].to(base[n].dtype)):
            continue
        for p in places.get(n, [n]):
            if p not in values:
                values[p] = found[n]
                kept.append(p)
    return values, kept, untied


def _in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _first(names: list[str]) -> str:
    return ", ".join(f"'{n}'" for n in names[:3]) + (", ..." if len(names) > 3 else "")


def _base(config: dict[str, Any]) -> str:
    name = config.get("base_model_name_or_path")
    return f" ('{name}')" if name else ""
