"""What an adapter cannot be attached to: each refusal says why, and the way out."""

import re
from collections.abc import Mapping

import torch
from torch import nn

from loratory.methods.method import Method
from loratory.runtime.layer import LAYER, Layer, Parameters, has_patched_forward
from loratory.runtime.shards import by_zero3, is_sharding
from loratory.runtime.state import is_adapted, refuse_in_rows, state_of
from loratory.sites import Bare, Site

RESERVED = {
    *dir(nn.ModuleDict()),
    "active",
    "merged",
    "mix",
    "route",
    "site",
    "unmerged",
    "unmerged_at",
}  # attributes of a Layer


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse to give DistributedDataParallel tensors to train that it has not seen."""
    if type(model).__name__ == "DistributedDataParallel":
        raise RuntimeError(
            "the model is wrapped in DistributedDataParallel already, which would not reduce the gradients of new adapters; "
            "adapt the model first, then wrap it"
        )


def check_attachable(model: nn.Module, name: str) -> None:
    """Refuse a model or a name that an adapter cannot be attached to."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name in RESERVED:
        raise ValueError(
            f"adapter name {name!r} cannot be used; letters, digits, '_' and '-' are allowed, and no attribute name of a torch module"
        )
    if is_adapted(model) and name in state_of(model).adaptations:
        raise ValueError(
            f"the adapter name '{name}' is taken; give another name=, or call loratory.detach(model, '{name}') first"
        )
    refuse_in_rows(model, "adding an adapter")
    adapted = is_adapted(model)
    if adapted and state_of(model).merged:
        raise RuntimeError("the model is merged; call loratory.unmerge(model) before adding an adapter")
    for each, module in model.named_modules():
        if not adapted and isinstance(module, Layer):
            raise RuntimeError(
                "a part of this model is adapted already on its own; detach it there first, or adapt the whole model from its root"
            )
        if is_sharding(type(module)):  # type: ignore[arg-type]
            raise RuntimeError(
                f"'{each or 'the model'}' is already sharded by fully_shard, so new adapters would not be; adapt the model first, then shard it"
            )
    if by_zero3(model):
        raise RuntimeError(
            "the model is already sharded by ZeRO-3, so new adapters would not be; load and adapt it before deepspeed.initialize, and before "
            "TrainingArguments(deepspeed=...) is made, after which from_pretrained shards what it loads"
        )


def check_method(site: Site, method: Method) -> None:
    """Refuse a method that the site cannot serve."""
    if method.input_dropout and not site.can_drop:
        site.drop(torch.empty(0), method.input_dropout, True)
    if not site.called and not method.mergeable:
        raise ValueError(
            f"layer '{site.name}' is a bare parameter, for which only a weight can be changed, and {type(method).__name__} changes more; "
            "leave the layer out with exclude="
        )


def check_layer(model: nn.Module, name: str, module: nn.Module | Bare) -> None:
    """Refuse a layer whose forward is not its class's, or a module that another library holds in its hands."""
    is_bare = isinstance(module, Bare)
    if isinstance(module, Bare):
        module = module.module
    own = module._modules.get(LAYER)
    if own is not None and (isinstance(own, Parameters) or not own.site.called) != is_bare:  # type: ignore[union-attr]
        raise ValueError(
            f"layer '{name}' is adapted already {'as a layer' if is_bare else 'by its parameters'}, and a module cannot be adapted both ways; "
            "detach that adapter first"
        )
    if not name and not hasattr(module, "get_input_embeddings"):
        raise ValueError(
            "the model itself is a single layer, which has no name; put it into a module, for example torch.nn.Sequential(layer)"
        )
    if has_patched_forward(module) and not is_bare:
        raise RuntimeError(
            f"layer '{name}' has a patched forward (set on the instance by another library), which an adapter would be hidden by; "
            "adapt the model before that patch, or leave the layer out with exclude="
        )
    if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False)):
        raise RuntimeError(
            f"layer '{name}' is offloaded by accelerate, which brings its weight in only while it runs; load the base without offloading "
            "(no device_map that holds cpu or disk), or leave the layer out with exclude="
        )
    if nn.utils.parametrize.is_parametrized(module):
        raise RuntimeError(
            f"layer '{name}' is parametrized; call torch.nn.utils.parametrize.remove_parametrizations on it first, or exclude it"
        )


def refuse_overlap(layers: Mapping[str, nn.Module | Bare]) -> None:
    """Refuse a layer that is chosen both as a module and by its parameter."""
    called = {id(m): n for n, m in layers.items() if isinstance(m, nn.Module)}
    for name, each in layers.items():
        if isinstance(each, Bare) and id(each.module) in called:
            raise ValueError(
                f"layer '{called[id(each.module)]}' and its parameter '{name}' are both chosen, and a module cannot be adapted both ways; "
                "leave one of them out"
            )
