"""Our adapter folder: `adapter.safetensors` with the tensors, `adapter.json` with everything else. No pickle, ever."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from loratory.methods.method import Declared, Method, Shared
from loratory.methods.registry import method_class, method_name
from loratory.runtime import shards
from loratory.runtime.attach import Built, install, site_for
from loratory.runtime.attachable import check_attachable, check_layer
from loratory.runtime.layer import COPIES, LAYER, SHARED, Tag, copies_of, fill_copies, layers_of, pools_of
from loratory.runtime.route import disabled
from loratory.runtime.state import Adaptation, is_adapted, one_name, require_adapter, unwrap
from loratory.sites import Site, target
from loratory.sites.parameter import ParameterSite
from loratory.store import atomic, identity
from loratory.store.card import write_card
from loratory.store.coded import check_codable, decode, encode
from loratory.store.inspection import Inspection
from loratory.store.rebuilt import checksum, rebuild
from loratory.version import __version__

TENSORS, RECORD = "adapter.safetensors", "adapter.json"
FORMAT, VERSION = "loratory-adapter", 1
FIELDS = (
    "method", "hyperparameters", "layers", "tags", "also_train", "kept", "bias", "untied", "allow_unused", "base", "training", "tensors", "sha256",
)  # fmt: skip


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    training: dict[str, Any] | None = None,
    card: bool = False,
    bits: int | None = None,
    is_main_process: bool | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one adapter (the active one) as `adapter.safetensors` and `adapter.json`, atomically; an adapter there is replaced.

    training: a JSON-able record of the run. card=True writes a model card (README.md) beside them. bits (2 to 8): the coefficients of
    a method that has some (NOLA) are stored as codes of so many bits, and loaded rounded; what is in memory stays as it is. With several
    processes every one may call this, and the first one writes (or those told is_main_process=True). Tensors that fully_shard has spread are gathered, so then every process must call it, unless a
    state_dict with the whole tensors is given. Raises ValueError if a tensor holds NaN or infinity, nothing is there to save, or bits is not possible.
    """
    model = unwrap(model)
    name = one_name(model, name)
    adaptation = require_adapter(model, name)
    check_codable(adaptation.method, name, bits)
    shards.reshard(model)
    writes = is_main_process if is_main_process is not None else shards.is_main_process()
    if not writes and state_dict is not None and not state_dict:
        return  # the whole one was gathered on the main process alone
    tensors, rebuilt = {}, {}
    for key, tensor, tag in _whole_tensors(model, name, state_dict):
        _check_finite(name, key, tensor)
        if tag is not None and tag.rebuilt:
            rebuilt[key] = [checksum(tensor), str(tensor.dtype).removeprefix("torch.")]
        else:
            tensors[key] = tensor.cpu().contiguous().clone() if writes else tensor[:0]
    if not tensors and adaptation.method.trains != "nothing":
        raise ValueError(f"adapter '{name}' holds no tensors, so an empty file would be written; adapt the model again")
    base = identity.identity(model, adaptation.copied, state_dict)
    if not writes:
        return
    coefficients = [
        k for k in tensors if k.startswith("layers/") and k.rpartition("/")[2] in adaptation.method.coefficients
    ]
    coded = encode(tensors, coefficients, bits) if bits is not None else {}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})  # one entry: the order of more is random
    record = {
        "format": FORMAT,
        "format_version": VERSION,
        "loratory_version": __version__,
        "method": method_name(adaptation.method),
        "hyperparameters": adaptation.method.hyperparameters(),
        "layers": {layer: _overrides(adaptation.method, method) for layer, method in adaptation.layers.items()},
        "parameters": {
            n: layer.site.axes
            for n, layer in layers_of(model).items()
            if name in layer and isinstance(layer.site, ParameterSite) and not layer.site.is_whole
        },
        "tags": _tags(model, name),
        "shared": {n: _tag(tag) for n, tag in pools_of(model)[name].tags.items()} if name in pools_of(model) else {},
        "links": {
            layer_name: links
            for layer_name, layer in layers_of(model).items()
            if name in layer and (links := {n: key for n, key in layer[name].links.items() if n != key})  # type: ignore[operator, union-attr]
        },
        "rebuilt": rebuilt,
        "coded": coded,
        "also_train": adaptation.copied,
        "bias": adaptation.bias,
        "untied": adaptation.untied,
        "kept": adaptation.kept,
        "allow_unused": adaptation.allow_unused,
        "base": base,
        "training": training if training is not None else adaptation.training,
        "tensors": {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in tensors.items()},
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    atomic.write_files(folder, {TENSORS: data, RECORD: atomic.to_json(record)})
    if card:
        write_card(Path(folder), inspect_native(Path(folder)))


def load_native(model: nn.Module, path: Path, *, name: str, trainable: bool, other_precision: bool) -> None:
    """Add the adapter of one of our folders to its base. See `loratory.store.load.load`."""
    record, tensors = read(path)
    model = unwrap(model)
    check_attachable(model, name)
    identity.check_identity(model, record["base"], record["also_train"], other_precision=other_precision)
    method = _method(method_class(record["method"]), record["hyperparameters"], path)
    methods = {
        layer: _method(type(method), record["hyperparameters"] | over, path) for layer, over in record["layers"].items()
    }
    axes = record.get("parameters") or {}  # not in files from before bare parameters
    sites: dict[str, Site] = {}
    for layer in methods:
        part = target(model, layer, axes.get(layer))
        check_layer(model, layer, part)
        sites[layer] = site_for(method, layer, part)
    with disabled(model) if is_adapted(model) else nullcontext():  # from the base's own weights
        tensors |= rebuild(method, methods, sites, record.get("rebuilt") or {}, path)
    links, shared = record.get("links") or {}, record.get("shared") or {}  # not in files from before shared tensors

    def declared(key: str, tag: dict[str, Any], site: Site) -> Declared:
        return Declared(tensors.pop(key).to(site.device), **tag)

    built: Built = {
        layer: (
            site,
            methods[layer],
            {n: declared(f"layers/{layer}/{n}", tag, site) for n, tag in record["tags"][layer].items()}
            | {n: Shared(key) for n, key in links.get(layer, {}).items()},
        )
        for layer, site in sites.items()
    }
    first = next(iter(sites.values()), None)
    pool = {n: declared(f"shared/{n}", tag, first) for n, tag in shared.items() if first is not None}
    adaptation = Adaptation(
        method,
        methods,
        list(record["also_train"]),
        record["bias"],
        record["untied"],
        record["allow_unused"],
        record["training"],
        kept=list(record["kept"]),
    )
    install(model, name, adaptation, built, pool, trainable=trainable)
    fill_copies(model, name, {key.removeprefix("also_train/"): t for key, t in tensors.items()})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Record and tensors of an adapter folder, checked against each other."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"'{path / RECORD}' is not valid JSON ({e}); it is damaged: take another copy") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(
            f"'{path / RECORD}' is no Loratory adapter record (its format is {record.get('format') if isinstance(record, dict) else type(record).__name__!r})"
        )
    if record.get("format_version") != VERSION:
        raise ValueError(
            f"'{path / RECORD}' has format version {record.get('format_version')}; this Loratory reads version {VERSION}: update Loratory"
        )
    if lacking := [key for key in FIELDS if key not in record]:
        raise ValueError(f"'{path / RECORD}' lacks '{lacking[0]}'; it was changed or damaged: take another copy")
    file = path / TENSORS
    pending = path / (TENSORS + atomic.PENDING)
    if _digest(file) != record["sha256"] and _digest(pending) == record["sha256"]:
        atomic.settle(path, TENSORS)
    if not file.exists():
        raise FileNotFoundError(f"'{path}' holds {RECORD} but not {TENSORS}; copy the whole folder")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise ValueError(
            f"'{file}' is not the file that {RECORD} was written with (its checksum differs): it is truncated or was changed; take another copy"
        )
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as e:
        raise ValueError(f"'{file}' cannot be read as safetensors ({e}); it is damaged: take another copy") from None
    wanted = set(record["tensors"])
    if missing := sorted(wanted - set(tensors)):
        raise ValueError(
            f"'{file}' lacks tensor '{missing[0]}' ({len(missing)} missing); it is damaged: take another copy"
        )
    if unexpected := sorted(set(tensors) - wanted):
        raise ValueError(
            f"'{file}' holds tensor '{unexpected[0]}', which {RECORD} does not name ({len(unexpected)} unexpected); take another copy"
        )
    try:
        decode(tensors, record.get("coded") or {})  # not in files from before codes
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(
            f"'{path / RECORD}' holds codes of coefficients that '{file.name}' does not have ({e}); it was changed or damaged: take another copy"
        ) from None
    named = [f"layers/{layer}/{n}" for layer in record["layers"] for n in record["tags"].get(layer, {"(none)": {}})]
    named += [f"also_train/{key}" for key in record["also_train"]]
    named += [f"shared/{n}" for n in record.get("shared") or {}]
    if strange := sorted((set(named) ^ set(tensors)) - (set(named) & set(record.get("rebuilt") or {}))):
        raise ValueError(
            f"'{path / RECORD}' does not agree with its own tensors (first: '{strange[0]}'); it was changed or damaged: take another copy"
        )
    return record, tensors


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None


def _whole_tensors(
    model: nn.Module, name: str, state_dict: Mapping[str, Tensor] | None
) -> Iterator[tuple[str, Tensor, Tag | None]]:
    """An adapter's tensors under their names in the file, one at a time, each gathered where it is spread over processes."""
    if name in pools_of(model):
        pool = pools_of(model)[name]
        for n, t in pool.tensors().items():
            yield f"shared/{n}", shards.whole(t, f"{SHARED}.{name}.{n}", state_dict), pool.tags[n]
    for layer_name, layer in layers_of(model).items():
        if name in layer:
            adapter: Any = layer[name]
            for n, t in adapter.tensors().items():
                key = f"{layer_name}.{LAYER}.{name}.{n}"
                yield f"layers/{layer_name}/{n}", shards.whole(t, key, state_dict), adapter.tags[n]
    for owner, copies in copies_of(model).items():
        if name in copies:
            prefix = f"{owner}." if owner else ""
            for leaf, t in [*copies[name].named_parameters(), *copies[name].named_buffers()]:
                key = f"{prefix}{COPIES}.{name}.{leaf}"
                yield f"also_train/{prefix}{leaf}", shards.whole(t, key, state_dict), None


def _check_finite(name: str, key: str, tensor: Tensor) -> None:
    what = "has no data (meta device)" if tensor.is_meta else "is empty (sharded away?)" if not tensor.numel() else ""
    if what or not bool(torch.isfinite(tensor).all()):
        what = what or "holds NaN or infinity"
        raise ValueError(
            f"tensor '{key}' of adapter '{name}' {what}, so it was not saved; go back to the last good checkpoint"
        )


def _tags(model: nn.Module, name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, Any] = {layer_name: layer[name] for layer_name, layer in layers_of(model).items() if name in layer}
    return {layer_name: {n: _tag(tag) for n, tag in adapter.tags.items()} for layer_name, adapter in found.items()}


def _tag(tag: Tag) -> dict[str, Any]:
    return {key: value for key, value in tag._asdict().items() if key != "rebuilt" or value}


def _overrides(method: Method, own: Method) -> dict[str, Any]:
    base = method.hyperparameters()
    return {k: v for k, v in own.hyperparameters().items() if v != base[k]}


def _method(cls: type[Method], hyperparameters: dict[str, Any], path: Path) -> Method:
    try:
        return cls(**hyperparameters)
    except (TypeError, ValueError) as e:
        raise ValueError(f"'{path / RECORD}' holds hyper-parameters that {cls.__name__} refuses: {e}") from None


def inspect_native(path: Path) -> Inspection:
    """What one of our folders holds; its files are checked, its base is not needed."""
    record, tensors = read(path)
    return Inspection(
        str(path), f"{FORMAT} {VERSION}", record["method"], record["hyperparameters"], record["layers"],
        {k: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in tensors.items()},
        record["also_train"], record["base"], record["training"], sum(f.stat().st_size for f in (path / TENSORS, path / RECORD)),
    )  # fmt: skip
