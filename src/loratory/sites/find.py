"""Which layers and bare parameters have a site, and why others have none."""

import torch
from torch import nn

from loratory.sites.conv import ConvSite
from loratory.sites.embedding import EmbeddingSite
from loratory.sites.linear import Conv1DSite, LinearSite
from loratory.sites.parameter import Bare, ParameterSite, check_axes, known_axes
from loratory.sites.quantized import quantized_site_class
from loratory.sites.site import Site

SITES: dict[type[nn.Module], type[Site]] = {
    nn.Conv1d: ConvSite,
    nn.Conv2d: ConvSite,
    nn.Conv3d: ConvSite,
    nn.Embedding: EmbeddingSite,
    nn.Linear: LinearSite,
}


def site_class(module: nn.Module) -> type[Site] | None:
    """The site class of a layer, by its class; None for modules that are not layers with a matrix."""
    quantized = quantized_site_class(module)
    if quantized is not None:
        return quantized
    for cls in type(module).__mro__:
        if cls in SITES and not isinstance(module, nn.modules.conv._ConvTransposeNd):
            return SITES[cls]
        if (
            cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        ):  # not imported for its name alone
            return Conv1DSite
    return None


def is_supported(module: nn.Module) -> bool:
    return site_class(module) is not None


def known_parameters(model: nn.Module) -> dict[str, Bare]:
    """The bare parameters of a model whose axes are known: expert stacks and the projections of MultiheadAttention."""
    return {
        f"{name}.{leaf}" if name else leaf: Bare(module, leaf, axes)
        for name, module in model.named_modules()
        for leaf, axes in known_axes(module).items()
    }


def target(model: nn.Module, name: str, axes: str | None = None) -> nn.Module | Bare:
    """What a name means in a model: a layer, or a bare parameter with these axes or the known ones.

    Raises ValueError for a name that is neither, or a parameter that is no matrix of its own.
    """
    owner, _, leaf = name.rpartition(".")
    module, layer = _module(model, owner), _module(model, name)
    if axes is None and layer is not None:
        is_read = leaf == "out_proj" and isinstance(module, nn.MultiheadAttention)
        return Bare(layer, "weight", "out in") if is_read else layer
    tensor = None if module is None else module._parameters.get(leaf)
    if module is None or tensor is None:
        raise ValueError(f"the model has no layer and no parameter '{name}'")
    if leaf == "weight" and site_class(module) is not None:
        raise ValueError(f"'{name}' is the weight of a {type(module).__name__}; name the layer, '{owner}', in where=")
    if isinstance(module, nn.RNNBase):
        raise ValueError(
            f"'{name}' belongs to a {type(module).__name__}, which keeps its weights in a list of its own and never reads them by name, "
            "so an adapter would do nothing; leave it out"
        )
    if axes is None:
        axes = known_axes(module).get(leaf)
    if axes is None:
        raise ValueError(
            f"'{name}' is a bare parameter {tuple(tensor.shape)} whose orientation is not known; "
            f"say it, for example parameters={{'{name}': '{_example(tensor)}'}}"
        )
    return Bare(module, leaf, check_axes(name, axes, tensor))


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule of this name; attributes are not asked, since an adapted parameter would be computed."""
    module: nn.Module | None = model
    for part in name.split(".") if name else []:
        module = None if module is None else module._modules.get(part)
    return module


def _example(tensor: torch.Tensor) -> str:
    return "out in" if tensor.dim() < 3 else " ".join(["experts", "out", "in", *["positions"] * (tensor.dim() - 3)])


def find_site(name: str, module: nn.Module | Bare, generator: torch.Generator | None = None) -> Site:
    """The site of a layer or bare parameter, or an error that says why it has none."""
    if isinstance(module, Bare):
        if module.tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"layer '{name}' is stored as {module.tensor.dtype}; allowed are float64, float32, bfloat16 and float16: "
                "load the base without quantisation"
            )
        return ParameterSite(name, module, generator)
    found = site_class(module)
    if found is None:
        raise TypeError(
            f"layer '{name}' is a {type(module).__name__}, which has no matrix to adapt; allowed are Linear, Conv1D (transformers), "
            "Embedding, Conv1d, Conv2d, Conv3d; leave it out with exclude=, or train it in full with also_train="
        )
    if found.rounds:
        return found(name, module, generator)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        stored = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(
            f"layer '{name}' ({type(module).__name__}) stores its weight as {stored}; allowed are float64, float32, bfloat16 "
            "and float16, and the quantised layers of loratory.quantize, bitsandbytes and torchao: load the base in one of them"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise ValueError(
            f"layer '{name}' is an Embedding with max_norm={module.max_norm}, which rewrites its rows at every look-up, so the base "
            "would not stay frozen; set max_norm=None or leave the layer out with exclude="
        )
    return found(name, module, generator)
