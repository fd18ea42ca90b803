"""Weights that several modules share (input embedding and output head): found, parted, joined, and said in the config."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from loratory.runtime.layer import is_ours
from loratory.sites.packed import Packed


def tied_places(model: nn.Module) -> dict[int, list[str]]:
    """Every parameter that several modules share: its id -> its names."""
    places: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        packed = _packed(model, owner)
        if packed is not None:  # its tensors make one weight
            if leaf in packed.names[1:]:
                continue
            name = f"{owner}.weight" if leaf in packed.names else name
        if not is_ours(name):
            places.setdefault(id(p), []).append(name)
    return {key: names for key, names in places.items() if len(names) > 1}


def part(model: nn.Module, chosen: Iterable[str]) -> dict[str, str]:
    """Give each chosen parameter that is shared one of its own, equal to it; returns where each had its partner."""
    chosen, parted = set(chosen), {}
    for names in tied_places(model).values():
        for name in [n for n in names if n in chosen][: len(names) - 1]:
            packed = _packed(model, name.rpartition(".")[0])
            if packed is not None:
                packed.part()
            else:
                shared = _parameter(model, name)
                _put(model, name, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
            parted[name] = next(n for n in names if n not in parted and n != name)
    return parted


def join(model: nn.Module, parted: dict[str, str]) -> None:
    """Undo `part`."""
    for name, partner in parted.items():
        packed = _packed(model, name.rpartition(".")[0])
        if packed is not None:
            packed.share(_packed(model, partner.rpartition(".")[0]))
            continue
        _put(model, name, _parameter(model, partner))


def tied_configs(model: nn.Module) -> list[Any]:
    """The configs of a transformers model that say its embeddings are tied."""
    config: Any = getattr(model, "config", None)
    parts = [config, config.get_text_config() if hasattr(config, "get_text_config") else None]
    return [c for i, c in enumerate(parts) if getattr(c, "tie_word_embeddings", False) and c not in parts[:i]]


def say_ties(model: Any, configs: list[Any]) -> None:
    """Let the configs that said tied at first say what is true now."""
    if not configs:
        return
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if inputs is not None and outputs is not None:
        for config in configs:
            config.tie_word_embeddings = (
                inputs.shares(outputs) if isinstance(inputs, Packed) else inputs.weight is outputs.weight
            )


def _packed(model: nn.Module, owner: str) -> Any:
    """The module of this name, if its weight is stored packed."""
    module = model.get_submodule(owner)
    return module if isinstance(module, Packed) else None


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    owner, _, leaf = name.rpartition(".")
    p = model.get_submodule(owner)._parameters[leaf]
    assert p is not None
    return p


def _put(model: nn.Module, name: str, p: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = p
